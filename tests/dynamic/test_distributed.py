"""Two processes, of which one gets text alone, equal one: plain data parallelism, ZeRO-2 and ZeRO-3, in one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dynamic.training
from llava.model.formats import read_tensors
from llava.train.train import main
from tests.dynamic.quiet_runs import no_noise
from tests.dynamic.test_runs import sparse_line
from tests.llava.train.launching import ROOT, launch_runs, mixed_rows
from tests.llava.train.test_training import HYDRA, losses

KINDS = ("ddp", "zero2", "zero3")
QUIET = Path(__file__).with_name("quiet_runs.py")
# Plain SGD shows the scale of the gradients, which Adam hides.
SHARED: dict[str, Any] = {"dynamic": True, "optim": "sgd", "learning_rate": 0.05, "predictor_lr": 0.2, "max_steps": 2}
SHARED |= {"max_grad_norm": 1.0, "save_strategy": "no", "train_sampling_strategy": "sequential"}
METHODS = {"full": SHARED, "hydralora": SHARED | HYDRA | {"lora_dropout": 0.0, "moe_balance_w": 0.05}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two processes."""
    pytest.importorskip("deepspeed", reason="the extra 'train' is not installed")
    folder = tmp_path_factory.mktemp("distributed")
    data = mixed_rows(folder)
    runs = []
    for kind in KINDS:
        way = {"ddp_backend": "gloo"} if kind == "ddp" else {"deepspeed": ROOT / "scripts" / f"{kind}.json"}
        for name, options in METHODS.items():
            line = sparse_line(
                folder / f"{kind} {name}", data_path=data, per_device_train_batch_size=1, **options, **way
            )
            runs.append({"arguments": line})
    launch_runs(2, runs, folder, program=QUIET)
    return folder


def trained(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.relative_to(folder)}/{name}": value for path in files for name, value in read_tensors(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic.training, "gumbel_noise", no_noise)
    reference = folder / f"one {name}"
    main(sparse_line(reference, data_path=folder / "mixed.json", per_device_train_batch_size=2, **METHODS[name]))
    expected = trained(reference)
    assert any("image_score_predictor" in key for key in expected)
    for kind in KINDS:
        ours = folder / f"{kind} {name}"
        assert losses(ours) == pytest.approx(losses(reference), abs=1e-5)
        found = trained(ours)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            torch.testing.assert_close(
                value, expected[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key} {text}"
            )
    other = folder / f"other {name}"
    main(sparse_line(other, data_path=folder / "mixed.json", per_device_train_batch_size=1, **METHODS[name]))
    assert losses(other) != pytest.approx(losses(reference), abs=1e-3), "another batch must give another curve"
