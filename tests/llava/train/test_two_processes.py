"""Data-parallel training with two processes on the CPU equals one process with the same global batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.train.train import main
from tests.llava.train.test_training import HYDRA, command_line, logits, losses

ROOT = Path(__file__).resolve().parents[3]


def launch(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = str(ROOT / "llava" / "train" / "train.py")
    done = subprocess.run(
        [*command, program, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


# No balance loss: the routers of sparse blocks would get no gradient, for which data parallelism would wait.
MODULES = {"hydralora_modules": "attention,vision", "dense_moe": False, "moe_balance_w": 0.0}
MODULES |= {"ddp_find_unused_parameters": False}
CASES = {
    "full": {},
    "hydralora": HYDRA | {"lora_dropout": 0.0},
    "modules": HYDRA | {"lora_dropout": 0.0} | MODULES,
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", CASES.values(), ids=CASES)
def test_two_processes_equal_one(extra: dict[str, Any], tmp_path: Path) -> None:
    """The two ranks hold different numbers of target tokens; one of them gets text-only rows at times."""
    # The balance loss is a mean over the samples of each rank, so equal batches make it comparable.
    shared = extra | {"max_steps": 3, "train_sampling_strategy": "sequential"}
    main(command_line(tmp_path / "one", per_device_train_batch_size=2, **shared))
    launch(command_line(tmp_path / "two", per_device_train_batch_size=1, ddp_backend="gloo", **shared))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    # Adam's first steps magnify rounding of tiny gradients; the updates themselves are of size 1e-2.
    torch.testing.assert_close(logits(tmp_path / "two"), logits(tmp_path / "one"), rtol=0, atol=5e-3)
    # One process goes on from a checkpoint that two have written.
    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    main(command_line(tmp_path / "resumed", per_device_train_batch_size=2, **shared))
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    torch.testing.assert_close(logits(tmp_path / "resumed"), logits(tmp_path / "two"), rtol=0, atol=1e-4)
