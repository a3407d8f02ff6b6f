"""FSDP2: a model that `fully_shard` splits over two processes is trained, saved and resumed as one plain process does.

On the CPU, by `sharded_runs.py`, through the functions that `--fsdp` goes through on GPUs; the option itself is
refused there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hydralora.finetune import main as finetune
from llava.errors import FlagError
from llava.runtime.fsdp.checks import fsdp_problems
from llava.runtime.fsdp.layers import layer_classes
from llava.train.arguments import parse_args
from llava.train.train import main
from tests.hydralora.text import test_finetune as text
from tests.llava.train.evaluation.common import evaluations, rows_with_tasks
from tests.llava.train.launching import launch_runs, mixed_rows
from tests.llava.train.test_deepspeed import EQUAL, RESUMED, SGD, assert_same, norms, plain_line
from tests.llava.train.test_training import command_line, losses

PROGRAM = Path(__file__).with_name("sharded_runs.py")
TOKENS = {"mm_use_im_start_end": True, "freeze_backbone": True, "max_steps": 4}
KEPT = RESUMED | {"tokens": TOKENS, "tower": {"unfreeze_mm_vision_tower": True, "max_steps": 4}}
CASES = EQUAL | {"lora": SGD | {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}}
TEXT = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "max_steps": 4, "save_steps": 2}


def sharded_line(output: Path, data: Path, **options: Any) -> list[str]:
    shared = {"data_path": data, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}
    return command_line(output, **(shared | options))


def evaluated(folder: Path, output: str, data: Path, **options: Any) -> list[str]:
    """A run in full with an evaluation before each checkpoint."""
    shared = {"eval_data_path": rows_with_tasks(folder), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    return sharded_line(folder / output, data, **(shared | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of all runs of two processes; a hang is ended by `launch_runs`."""
    path = tmp_path_factory.mktemp("sharded")
    data = mixed_rows(path)
    text.save_base(path / "base")
    text.save_data(path / "data")
    runs: list[dict[str, Any]] = []
    for name, options in CASES.items():
        runs.append({"arguments": sharded_line(path / name, data, **options)})
    for name, options in KEPT.items():
        runs.append({"arguments": sharded_line(path / f"{name} whole", data, **options)})
        runs.append({"arguments": sharded_line(path / f"{name} cut", data, **options)})
        runs[-1]["copy"] = [str(path / f"{name} {kind}" / "checkpoint-2") for kind in ("whole", "cut")]
    runs.append({"arguments": evaluated(path, "evaluated", data)})
    for kind in ("whole", "cut"):
        arguments = text.command_line(path, path / f"text {kind}", **TEXT)
        runs.append({"program": "hydralora.finetune", "arguments": arguments})
    runs[-1]["copy"] = [str(path / f"text {kind}" / "checkpoint-2") for kind in ("whole", "cut")]
    log = launch_runs(2, runs, path, program=PROGRAM)
    split = [line for line in log.splitlines() if line.startswith("split: ")]
    assert len(split) == 2 * len(runs), "each process of each run says that its model is split"
    assert sum(" 0 moments" in line for line in split) < len(split), "resumed moments are split too"
    assert all("DecoderLayer" in line for line in split), split
    return path


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("name", CASES)
def test_equals_one_plain_process(name: str, folder: Path) -> None:
    """Same losses, gradient norms and weights; only the order of sums differs."""
    reference = folder / f"plain {name}"
    main(plain_line(reference, folder / "mixed.json", **CASES[name]))
    assert losses(folder / name) == pytest.approx(losses(reference), abs=1e-5)
    assert norms(folder / name) == pytest.approx(norms(reference), rel=1e-4)
    assert_same(folder / name, reference, 1e-5)


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("name", KEPT)
def test_resume_is_exact(name: str, folder: Path) -> None:
    whole, cut = folder / f"{name} whole", folder / f"{name} cut"
    assert losses(cut) == losses(whole)
    assert_same(cut, whole, 0.0)


@pytest.mark.slow
def test_an_evaluation_changes_nothing(folder: Path) -> None:
    """A checkpoint that follows it too, although a pass without gradient leaves parameters whole."""
    found = evaluations(folder / "evaluated")
    assert [entry["step"] for entry in found] == [2, 4]
    assert (folder / "evaluated" / "checkpoint-4").is_dir()
    main(evaluated(folder, "evaluated plain", folder / "mixed.json", per_device_train_batch_size=2))
    expected = evaluations(folder / "evaluated plain")
    for name in ("eval_loss", "eval_image_loss", "eval_text_loss"):
        assert [entry[name] for entry in found] == pytest.approx([entry[name] for entry in expected], abs=1e-3), name
    assert losses(folder / "evaluated") == pytest.approx(losses(folder / "evaluated plain"), abs=1e-3)


@pytest.mark.slow
def test_a_text_run_is_exact(folder: Path, tmp_path: Path) -> None:
    whole, cut = folder / "text whole", folder / "text cut"
    ours, again = (load_file(each / "sft_lora_model" / "adapter_model.safetensors") for each in (whole, cut))
    assert ours.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    plain = finetune(text.command_line(folder, tmp_path, **(TEXT | {"per_device_train_batch_size": 4})))
    one = [row["loss"] for row in text.history(tmp_path) if "loss" in row]
    assert [row["loss"] for row in text.history(whole) if "loss" in row] == pytest.approx(one, abs=1e-4)
    reference = load_file(plain / "adapter_model.safetensors")
    # Adam's first steps magnify rounding of tiny gradients; the updates themselves are of size 2e-3.
    assert max((ours[name] - value).abs().max().item() for name, value in reference.items()) < 1e-3


@pytest.mark.slow
def test_the_optimizer_is_one_file(folder: Path, tmp_path: Path) -> None:
    """Whole and by names: one process that does not split its model resumes from it."""
    checkpoint = folder / "full whole" / "checkpoint-2"
    assert not list(checkpoint.glob("*fsdp*"))
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert state["state"]["model.norm.weight"]["exp_avg"].shape == (40,)
    shutil.copytree(checkpoint, tmp_path / "out" / "checkpoint-2")
    main(plain_line(tmp_path / "out", folder / "mixed.json", **RESUMED["full"]))
    assert losses(tmp_path / "out") == pytest.approx(losses(folder / "full whole"), abs=1e-5)
    assert_same(tmp_path / "out", folder / "full whole", 2e-6)


REFUSED = {
    "cpu": ({"use_cpu": True}, 16, "needs GPUs"),
    "one process": ({"world_size": 1}, 16, "there is one; start with torchrun"),
    "deepspeed": ({"deepspeed": "x.json"}, 16, "both split the model"),
    "4 bits": ({}, 4, "cannot split weights that --bits 4 quantises"),
    "version 1": ({"fsdp_config": {"version": 1}}, 16, "version is 1"),
}


def options_of(**changes: Any) -> SimpleNamespace:
    """Options of a run on GPUs, as far as they are read."""
    given: dict[str, Any] = {"fsdp": True, "fsdp_config": {}, "use_cpu": False, "device": torch.device("cuda")}
    return SimpleNamespace(**(given | {"world_size": 2, "deepspeed": None} | changes))


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_cannot_be_carried_out(name: str) -> None:
    changes, bits, message = REFUSED[name]
    (problem,) = fsdp_problems(options_of(**changes), bits, "--bits")
    assert message in problem
    assert not fsdp_problems(options_of(), 16, "--bits")
    assert not fsdp_problems(options_of(**(changes | {"fsdp": False})), bits, "--bits")


def test_the_cpu_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--fsdp: needs GPUs"):
        parse_args(command_line(tmp_path, fsdp="full_shard", model_name_or_path="not/there"))


def test_layers_are_found_by_structure() -> None:
    layers = torch.nn.ModuleList([torch.nn.TransformerEncoderLayer(4, 1) for _ in range(2)])
    model = torch.nn.ModuleDict({"inner": torch.nn.ModuleDict({"layers": layers}), "head": torch.nn.Linear(4, 4)})
    assert layer_classes(model) == ["TransformerEncoderLayer"]
    model["acts"] = torch.nn.ModuleList([torch.nn.ReLU(), torch.nn.ReLU()])
    assert layer_classes(model) == ["TransformerEncoderLayer"], "modules without parameters are no layers"
