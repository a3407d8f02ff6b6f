"""DeepSpeed ZeRO-2 and ZeRO-3 on the CPU with two processes, one of which gets text alone, against one plain process.

All runs of one number of processes share one launch, because starting takes longer than training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.errors import CheckpointError, FlagError
from llava.model.formats import read_tensors
from llava.runtime.zero import prepare_resume
from llava.train.train import main, parse_args
from tests.bombs import inside, zip_archive
from tests.golden import golden_dir
from tests.llava.train.launching import ROOT, launch_runs, mixed_rows
from tests.llava.train.test_training import HYDRA, command_line, losses

pytest.importorskip("deepspeed", reason="the extra 'train' is not installed")

LLAVA = golden_dir("llava")
STAGES = ("zero2", "zero3")
ROUTED = HYDRA | {"lora_dropout": 0.0, "lora_modules": "q_proj,k_proj,v_proj,o_proj", "moe_balance_w": 0.05}
MODULES = {"hydralora_modules": "attention,vision", "gradient_checkpointing": True}
# Plain SGD shows the scale of the gradients, which Adam hides.
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.4, "gradient_accumulation_steps": 2, "max_steps": 3}
SGD |= {"save_strategy": "no"}
EQUAL: dict[str, dict[str, Any]] = {
    "full": SGD,
    "hydralora": SGD | ROUTED,
    "hydralora sparse": SGD | ROUTED | {"dense_moe": False},
    "hydralora modules": SGD | ROUTED | MODULES,
    "mma": SGD
    | {
        "mma": True,
        "adapter_type": "block",
        "visual_adapter_type": "router_block",
        "visual_input": "llava",
        "adapter_dropout": 0.0,
        "gradient_checkpointing": True,
    },
    "tower": SGD | {"unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 1.0},
    "stage 1": SGD
    | {
        "tune_mm_mlp_adapter": True,
        "model_name_or_path": LLAVA / "tiny-vicuna",
        "pretrain_mm_mlp_adapter": LLAVA / "tiny-llava-pretrain" / "mm_projector.bin",
    },
}
RESUMED: dict[str, dict[str, Any]] = {"full": {"max_steps": 4}, "hydralora": ROUTED | {"max_steps": 4}}
HALF = ROUTED | {"bf16": True, "gradient_checkpointing": True, "save_steps": 2}


def zero_line(stage: str, output: Path, data: Path, processes: int, **options: Any) -> list[str]:
    shared = {
        "data_path": data,
        "train_sampling_strategy": "sequential",
        "deepspeed": ROOT / "scripts" / f"{stage}.json",
    }
    return command_line(output, per_device_train_batch_size=2 // processes, **(shared | options))


def plain_line(output: Path, data: Path, **options: Any) -> list[str]:
    rows = 2 * options.pop("gradient_accumulation_steps", 1)
    shared = {"data_path": data, "train_sampling_strategy": "sequential", "per_device_train_batch_size": rows}
    return command_line(output, **(shared | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return mixed_rows(folder)


@pytest.fixture(scope="module")
def two_processes(folder: Path, data: Path) -> Path:
    """Every run of two processes; a hang is ended by `launch_runs`."""
    runs: list[dict[str, Any]] = []
    for stage in STAGES:
        for name, options in EQUAL.items():
            runs.append({"arguments": zero_line(stage, folder / f"{stage} {name}", data, 2, **options)})
        for name, options in RESUMED.items():
            whole, cut = folder / f"{stage} {name} whole", folder / f"{stage} {name} cut"
            runs.append({"arguments": zero_line(stage, whole, data, 2, **options)})
            copied = [str(path / "checkpoint-2") for path in (whole, cut)]
            runs.append({"arguments": zero_line(stage, cut, data, 2, **options), "copy": copied})
        runs.append({"arguments": zero_line(stage, folder / f"{stage} half", data, 2, **HALF)})
    runs.append({"arguments": zero_line("zero3", folder / "untargeted", data, 2, **SGD), "untargeted": 1})
    launch_runs(2, runs, folder)
    return folder


@pytest.fixture(scope="module")
def one_process(two_processes: Path, data: Path) -> Path:
    """One process resumes where two stopped."""
    runs = []
    for stage in STAGES:
        for name, options in RESUMED.items():
            source, target = two_processes / f"{stage} {name} whole", two_processes / f"{stage} {name} one"
            copied = [str(path / "checkpoint-2") for path in (source, target)]
            runs.append({"arguments": zero_line(stage, target, data, 1, **options), "copy": copied})
    launch_runs(1, runs, two_processes)
    return two_processes


def trained(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whatever the recipe wrote."""
    files = [path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path.relative_to(folder))]
    assert files
    return {f"{path.relative_to(folder)}/{name}": value for path in files for name, value in read_tensors(path).items()}


def assert_same(ours: Path, reference: Path, tolerance: float) -> None:
    left, right = trained(ours), trained(reference)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name} {text}"
        )


def norms(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["grad_norm"] for entry in history if "grad_norm" in entry]


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("name", EQUAL)
def test_equals_one_plain_process(name: str, two_processes: Path, data: Path) -> None:
    """Same losses, gradient norms and weights; only the order of sums differs."""
    reference = two_processes / f"plain {name}"
    main(plain_line(reference, data, **EQUAL[name]))
    assert max(norms(reference)) > SGD["max_grad_norm"], "clipping must be at work"
    for stage in STAGES:
        ours = two_processes / f"{stage} {name}"
        assert losses(ours) == pytest.approx(losses(reference), abs=1e-5)
        assert norms(ours) == pytest.approx(norms(reference), rel=1e-4)
        assert_same(ours, reference, 1e-5)
    unclipped = two_processes / f"plain {name}, not clipped"
    main(plain_line(unclipped, data, **(EQUAL[name] | {"max_grad_norm": 0})))
    with pytest.raises(AssertionError):
        assert_same(unclipped, reference, 1e-4)


@pytest.mark.slow
def test_a_process_without_targets_takes_part(two_processes: Path, data: Path, tmp_path: Path) -> None:
    """Every process gathers the head once in a pass, whatever it has to predict; the others' numbers are the same."""
    (tmp_path / "theirs.json").write_text(json.dumps(json.loads(data.read_text())[::2]))
    options = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    main(command_line(tmp_path / "plain", data_path=tmp_path / "theirs.json", **(SGD | options)))
    assert losses(two_processes / "untargeted") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    assert_same(two_processes / "untargeted", tmp_path / "plain", 1e-5)


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_exact(stage: str, name: str, two_processes: Path) -> None:
    whole, cut = two_processes / f"{stage} {name} whole", two_processes / f"{stage} {name} cut"
    assert losses(cut) == losses(whole)
    assert_same(cut, whole, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("stage", STAGES)
def test_one_process_resumes_what_two_wrote(stage: str, name: str, one_process: Path) -> None:
    """Moments, step counters and learning rates of every group arrive; only the order of sums differs."""
    whole, one = one_process / f"{stage} {name} whole", one_process / f"{stage} {name} one"
    assert losses(one) == pytest.approx(losses(whole), abs=1e-5)
    assert_same(one, whole, 2e-6)
    assert not list(one.glob("tmp-*"))


@pytest.mark.slow
def test_a_bomb_is_refused_before_deepspeed_opens_it(two_processes: Path, data: Path, tmp_path: Path) -> None:
    """In each kind of its files, by each stage, by one process (which converts the files first) and by two."""
    for processes in (1, 2):
        runs = []
        for stage in STAGES:
            source = two_processes / f"{stage} hydralora whole" / "checkpoint-2"
            for file in sorted(source.glob("global_step2/*.pt")):
                output = tmp_path / f"{processes} {stage} {file.stem}"
                shutil.copytree(source, output / "checkpoint-2")
                bomb = zip_archive(inside(tmp_path / "marker"))
                (output / "checkpoint-2" / "global_step2" / file.name).write_bytes(bomb)
                arguments = zero_line(stage, output, data, processes, **RESUMED["hydralora"])
                runs.append({"arguments": arguments, "refused": file.name})
        assert len(runs) == 7  # ZeRO-2 keeps the weights in one file, ZeRO-3 in one for each process
        launch_runs(processes, runs, tmp_path)
        assert not (tmp_path / "marker").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_saves_what_the_optimizer_holds(stage: str, two_processes: Path) -> None:
    folder = two_processes / f"{stage} half"
    for checkpoint in ("checkpoint-2", "checkpoint-3", "."):
        tensors = trained(folder / checkpoint)
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        assert any(not torch.equal(value, value.bfloat16().float()) for value in tensors.values())
    assert losses(folder) == pytest.approx(losses(two_processes / f"{stage} hydralora whole")[:3], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_checkpoint_is_complete(stage: str, two_processes: Path) -> None:
    """Each `checkpoint-N` holds what the end of the run holds, in whole tensors."""
    folder = two_processes / f"{stage} hydralora whole"
    end = trained(folder)
    for name in ("checkpoint-2", "checkpoint-4"):
        tensors = trained(folder / name)
        assert {key: value.shape for key, value in tensors.items()} == {key: value.shape for key, value in end.items()}
    assert all(torch.equal(value, end[name]) for name, value in trained(folder / "checkpoint-4").items())


def refused(match: str, tmp_path: Path, **options: Any) -> None:
    with pytest.raises(FlagError, match=match):
        parse_args(command_line(tmp_path, **options))


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    refused("cannot be read", tmp_path, deepspeed=tmp_path / "missing.json")
    refused("no valid JSON", tmp_path, deepspeed=broken)


def test_an_optimizer_of_deepspeeds_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Upstream's file for offloading leaves all values to the program; fixed ones would win over the flags."""
    settings = json.loads((ROOT / "scripts" / "zero3_offload.json").read_text())
    settings["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}
    settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_min_lr": "auto"}}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    training = parse_args(command_line(tmp_path, deepspeed=path)).training
    assert not {"optimizer", "scheduler"} & set(training.hf_deepspeed_config.config)
    assert training.hf_deepspeed_config.config["gradient_clipping"] == training.max_grad_norm
    assert "'scheduler' (WarmupLR) is ignored" in capsys.readouterr().out
    settings["optimizer"]["params"]["lr"] = 1e-3
    path.write_text(json.dumps(settings))
    refused("'optimizer' sets", tmp_path, deepspeed=path)


def test_accelerates_settings_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --use_deepspeed` names the file in the environment."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused("--deepspeed FILE", tmp_path)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ROOT / "scripts" / "zero3.json"))
    assert parse_args(command_line(tmp_path)).training.hf_deepspeed_config.is_zero3()


def test_the_number_that_the_launcher_passes(tmp_path: Path) -> None:
    assert parse_args([*command_line(tmp_path), "--local_rank=1"]).training.local_rank == 1


def test_quantised_weights_cannot_be_split(tmp_path: Path) -> None:
    refused("ZeRO-3", tmp_path, deepspeed=ROOT / "scripts" / "zero3.json", bits=4, lora_enable=True)


def test_started_without_a_launcher(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="torchrun"):
        main(command_line(tmp_path, deepspeed=ROOT / "scripts" / "zero2.json"))


def test_checkpoints_of_another_kind_are_refused(tmp_path: Path) -> None:
    zero2, zero3 = (
        parse_args(command_line(tmp_path, deepspeed=ROOT / "scripts" / f"{s}.json")).training for s in STAGES
    )
    plain = parse_args(command_line(tmp_path)).training
    written = tmp_path / "checkpoint-1"
    (written / "global_step1").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="without DeepSpeed"):
        prepare_resume(zero2, written)
    (written / "latest").write_text("global_step1")
    torch.save({}, written / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="with DeepSpeed"):
        prepare_resume(plain, written)
    with pytest.raises(CheckpointError, match="ZeRO-2"):
        prepare_resume(zero3, written)
    prepare_resume(zero2, written)
    assert "checkpoint" not in zero2.hf_deepspeed_config.config
    torch.save({}, written / "global_step1" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    prepare_resume(zero2, written)
    assert zero2.hf_deepspeed_config.config["checkpoint"] == {"load_universal": True}
