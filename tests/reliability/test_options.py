"""A finished or interrupted run under changed options is refused with the differences; harmless ones may change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava.errors import FlagError
from llava.train.arguments import parse_args
from llava.train.run_record import run_record
from llava.train.train import main
from llava.train.unchanged import differences, refuse_changes
from tests.train.test_training import BASE, HYDRA, LLAVA, command_line

RUN: dict[str, Any] = HYDRA | {"max_steps": 2, "save_steps": 1, "save_total_limit": 2}


def record(output: Path, **changes: Any) -> dict[str, Any]:
    """The record of a run, as it comes out of its file."""
    options = {name: value for name, value in (RUN | changes).items() if value is not None}
    return json.loads(json.dumps(run_record(parse_args(command_line(output, **options))), default=str))


# Option and value of now, and what the message must contain.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lora_alpha": 64}, "--lora_alpha: 8 then, 64 now"),
    ({"lora_rank": 2}, "--lora_r"),
    ({"version": "plain"}, "--version: 'v1' then, 'plain' now"),
    ({"model_name_or_path": LLAVA / "tiny-vicuna"}, "--model_name_or_path"),
    ({"llm_moe_num_experts": 2}, "--llm_moe_num_experts"),
    ({"dense_moe": False}, "--dense_moe"),
    ({"moe_balance_w": 0.5}, "--moe_balance_w"),
    ({"learning_rate": 0.5}, "--learning_rate"),
    ({"mm_projector_lr": 0.5}, "--mm_projector_lr"),
    ({"seed": 7}, "--seed"),
    ({"data_seed": 7}, "--data_seed"),
    ({"max_steps": 9}, "--max_steps"),
    ({"per_device_train_batch_size": 1}, "--per_device_train_batch_size"),
    ({"image_aspect_ratio": "resize"}, "--image_aspect_ratio"),
    ({"mm_vision_select_layer": -1}, "--mm_vision_select_layer"),
    ({"freeze_mm_mlp_adapter": True}, "--freeze_mm_mlp_adapter"),
    ({"unfreeze_mm_vision_tower": True}, "--unfreeze_mm_vision_tower"),
    ({"weight_decay": 0.5}, "--weight_decay"),
    ({"optim": "sgd"}, "--optim"),
    ({"lr_scheduler_type": "cosine"}, "--lr_scheduler_type"),
    ({"warmup_steps": 5}, "--warmup_steps"),
    ({"model_max_length": 99}, "--model_max_length"),
    ({"bf16": True}, "--bf16"),
    ({"group_by_modality_length": True}, "--group_by_modality_length"),
    ({"loss_reduction": "all"}, "--loss_reduction"),
    ({"on_bad_sample": "skip"}, "--on_bad_sample"),
    ({"max_grad_norm": 0.1}, "--max_grad_norm"),
]
ALLOWED: list[dict[str, Any]] = [
    {"logging_steps": 5},
    {"save_steps": 7},
    {"save_total_limit": 9},
    {"save_strategy": "epoch"},
    {"dataloader_num_workers": 2},
    {"dataloader_pin_memory": False},
    {"run_name": "another"},
    {"disable_tqdm": False},
    {"gradient_checkpointing": True},
    {"ddp_timeout": 99},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    {"attn_implementation": "eager"},
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_options_that_decide_numbers(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    lines = differences(record(tmp_path), record(tmp_path, **changes))
    assert any(line.startswith(said) for line in lines), lines


@pytest.mark.parametrize("changes", ALLOWED, ids=str)
def test_options_that_do_not(changes: dict[str, Any], tmp_path: Path) -> None:
    assert differences(record(tmp_path), record(tmp_path / "elsewhere", **changes)) == []


def test_length_is_free_under_a_constant_rate(tmp_path: Path) -> None:
    plain = {"use_lora": None, "lora_rank": None, "lora_enable": True, "lr_scheduler_type": "constant"}
    now = {"max_steps": 9}
    assert differences(record(tmp_path, **plain), record(tmp_path, **plain, **now)) == []
    assert differences(record(tmp_path), record(tmp_path, **now)), "a linear schedule depends on it"


def test_a_base_that_was_moved_and_one_that_was_replaced(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "one")
    then = record(tmp_path / "out", model_name_or_path=tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert differences(then, record(tmp_path / "out", model_name_or_path=tmp_path / "two")) == []
    shutil.copytree(LLAVA / "tiny-vicuna", tmp_path / "one")
    lines = differences(then, record(tmp_path / "out", model_name_or_path=tmp_path / "one"))
    assert lines == [f"--model_name_or_path: '{tmp_path}/one' then, the same path, other content"]


def test_data_that_was_edited(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    shutil.copyfile(LLAVA / "data" / "finetune.json", data)
    then = record(tmp_path / "out", data_path=data)
    data.write_text(json.dumps(json.loads(data.read_text())[1:]))
    assert "--data_path" in differences(then, record(tmp_path / "out", data_path=data))[0]


def test_records_of_programs_before(tmp_path: Path) -> None:
    """Options that one of two versions does not have, and what was not recorded then, are no differences."""
    then = record(tmp_path)
    for key in ("fingerprints", "world_size"):
        del then[key]
    del then["arguments"]["program"], then["arguments"]["training"]["weight_decay"]
    assert differences(then, record(tmp_path)) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    main(command_line(folder, **RUN))
    return folder


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["interrupted", "finished", "results alone", "another folder"])
def test_nothing_is_relabeled(what: str, finished: Path, tmp_path: Path) -> None:
    """The refused run leaves every byte as it was."""
    output = shutil.copytree(finished, tmp_path / "out")
    options = RUN | {"lora_alpha": 64}
    if what in ("interrupted", "results alone"):
        shutil.rmtree(output / "checkpoint-2")
    if what == "results alone":
        shutil.rmtree(output / "checkpoint-1")
    if what == "interrupted":
        for path in [path for path in output.iterdir() if path.is_file() and path.name != "run.json"]:
            path.unlink()
    target = output
    if what == "another folder":
        target = tmp_path / "new"
        options |= {"resume_from_checkpoint": output / "checkpoint-1"}
    before = state(output)
    with pytest.raises(FlagError, match=r"(?s)changed options.*--lora_alpha: 8 then, 64 now.*--output_dir"):
        main(command_line(target, **options))
    assert state(output) == before
    assert not (tmp_path / "new").exists()


def test_without_results_there_is_nothing_to_protect(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(record(tmp_path)))
    now = record(tmp_path, lora_alpha=64)
    refuse_changes(now, tmp_path, None, results=False)
    with pytest.raises(FlagError, match="--lora_alpha"):
        refuse_changes(now, tmp_path, None, results=True)
