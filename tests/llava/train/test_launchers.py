"""The launchers that users have, two processes on the CPU each: the same run, the same losses.

torchrun with ZeRO-2 and ZeRO-3 is tested in detail in `test_deepspeed.py`; here are the other ways to start.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from llava.train.train import main
from tests.llava.train.launching import ROOT, TRAIN, finish, start, torchrun
from tests.llava.train.test_training import command_line

pytest.importorskip("deepspeed", reason="the extra `train` is not installed")

PROGRAMS = Path(sys.executable).parent
RUN = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0, "max_steps": 2, "save_strategy": "no"}


def free_port() -> str:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launcher(name: str) -> tuple[list[str], list[str]]:
    """The launcher's command line, and what goes behind the program."""
    settings = {stage: str(ROOT / "scripts" / f"{stage}.json") for stage in ("zero2", "zero3", "zero3_offload")}
    if name == "deepspeed":
        command = [str(PROGRAMS / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port()]
        return command, ["--deepspeed", settings["zero2"]]
    if name == "accelerate":
        command = [str(PROGRAMS / "accelerate"), "launch", "--use_deepspeed", "--num_processes", "2"]
        command += ["--deepspeed_config_file", settings["zero3"], "--num_machines", "1", "--mixed_precision", "no"]
        return [*command, "--main_process_port", free_port()], []
    return torchrun(2), ["--deepspeed", settings["zero3_offload"]]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed", "accelerate", "torchrun, offloaded"])
def test_launcher(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled_extensions: Path) -> None:
    if "offloaded" in name and shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles the optimizer of zero3_offload.json with g++, which is not here")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(compiled_extensions))
    command, behind = launcher(name)
    arguments = command_line(tmp_path / "several", **RUN, per_device_train_batch_size=1)
    log = tmp_path / "log"
    status = finish(start(command, TRAIN, [*arguments, *behind], log), limit=400)
    assert status == 0, log.read_text()[-4000:]
    main(command_line(tmp_path / "one", **RUN, per_device_train_batch_size=2))
    assert losses(tmp_path / "several") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert (tmp_path / "several" / "adapter_model.safetensors").is_file()
