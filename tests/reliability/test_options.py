"""A finished or interrupted run under changed options is refused with the differences; harmless ones may change.

Holds for each of the three training programs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.errors import CheckpointError, FlagError
from llava.runtime.unchanged import differences, refuse_changes
from tests.llava.train.test_training import BASE, LLAVA
from tests.reliability.programs import PARTS, Program, Whole

TRAIN, LAVIN, TEXT = PARTS
Changes = dict[str, Any]

# Option and value of now, and what the message must contain.
OF_LLAVA: list[tuple[Changes, str]] = [
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
OF_LAVIN: list[tuple[Changes, str]] = [
    ({"adapter_scale": 0.5}, "--adapter_scale: 1.0 then, 0.5 now"),
    ({"adapter_type": "block"}, "--adapter_type"),
    ({"visual_adapter_type": "normal"}, "--visual_adapter_type"),
    ({"adapter_dim": 4}, "--adapter_dim"),
    ({"hidden_proj": 8}, "--hidden_proj"),
    ({"temperature": 5.0}, "--temperature"),
    ({"drop_path": 0.1}, "--drop_path"),
    ({"max_seq_len": 99}, "--max_seq_len"),
    ({"prompt_format": "CQM-A"}, "--prompt_format: 'QCM-ALE' then, 'CQM-A' now"),
    ({"use_caption": ""}, "--use_caption"),
    ({"options": "ABCDEF"}, "--options"),
    ({"use_vicuna": ""}, "--use_vicuna"),
    ({"lr": 0.5}, "--lr"),
    ({"min_lr": 0.001}, "--min_lr"),
    ({"warmup_epochs": 1}, "--warmup_epochs"),
    ({"weight_decay": 0.5}, "--weight_decay"),
    ({"clip_grad": 1.0}, "--clip_grad"),
    ({"batch_size": 2}, "--batch_size"),
    ({"accum_iter": 1}, "--accum_iter"),
    ({"epochs": 3}, "--epochs"),
    ({"seed": 7}, "--seed"),
    ({"optim": "sgd"}, "--optim"),
    ({"requires_image": True}, "--requires_image"),
]
OF_TEXT: list[tuple[Changes, str]] = [
    ({"lora_alpha": 64}, "--lora_alpha: 8.0 then, 64.0 now"),
    ({"lora_rank": 2}, "--lora_rank"),
    ({"lora_nums": 3}, "--lora_nums"),
    ({"lora_dropout": 0.2}, "--lora_dropout"),
    ({"trainable": "q_proj"}, "--trainable"),
    ({"routing": "sequence"}, "--routing"),
    ({"balance_weight": 0.5}, "--balance_weight"),
    ({"model_name_or_path": LLAVA / "tiny-vicuna"}, "--model_name_or_path"),
    ({"torch_dtype": "bfloat16"}, "--torch_dtype"),
    ({"max_seq_length": 32}, "--max_seq_length"),
    ({"learning_rate": 0.5}, "--learning_rate"),
    ({"lr_scheduler_type": "cosine"}, "--lr_scheduler_type"),
    ({"warmup_steps": 1}, "--warmup_steps"),
    ({"weight_decay": 0.5}, "--weight_decay"),
    ({"max_grad_norm": 0.1}, "--max_grad_norm"),
    ({"optim": "sgd"}, "--optim"),
    ({"per_device_train_batch_size": 1}, "--per_device_train_batch_size"),
    ({"max_steps": 9}, "--max_steps"),
    ({"seed": 7}, "--seed"),
    ({"data_seed": 7}, "--data_seed"),
    ({"bf16": True}, "--bf16"),
]
REFUSED = {TRAIN: OF_LLAVA, LAVIN: OF_LAVIN, TEXT: OF_TEXT}

ANYWHERE: list[Changes] = [
    {"logging_steps": 5},
    {"save_steps": 7},
    {"save_total_limit": 9},
    {"run_name": "another"},
    {"disable_tqdm": False},
    {"ddp_timeout": 99},
]
"""What may change in each program."""

OF_ITS_OWN: dict[str, list[Changes]] = {
    TRAIN: [
        {"save_strategy": "epoch"},
        {"dataloader_num_workers": 2},
        {"dataloader_pin_memory": False},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"attn_implementation": "eager"},
    ],
    LAVIN: [
        {"num_workers": 2},
        {"no_pin_mem": ""},
        {"gradient_checkpointing": ""},
        {"batch_size": 2, "accum_iter": 4},
        {"n_prompt": 5},
        {"cpu_load": ""},
    ],
    TEXT: [
        {"dataloader_num_workers": 2},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"overwrite_cache": True},
        {"preprocessing_num_workers": 3},
    ],
}


@pytest.fixture
def chosen_program(program: str, training_programs: dict[str, Program]) -> Program:
    """The program that a test is about."""
    return training_programs[program]


@pytest.mark.parametrize(
    ("program", "changes", "said"),
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_options_that_decide_numbers(changes: Changes, said: str, chosen_program: Program, tmp_path: Path) -> None:
    record = chosen_program.recorded
    lines = differences(record(tmp_path), record(tmp_path, **changes))
    assert any(line.startswith(said) for line in lines), lines


@pytest.mark.parametrize(
    ("program", "changes"), [(name, changes) for name, own in OF_ITS_OWN.items() for changes in ANYWHERE + own], ids=str
)
def test_options_that_do_not(changes: Changes, chosen_program: Program, tmp_path: Path) -> None:
    record = chosen_program.recorded
    assert differences(record(tmp_path), record(tmp_path / "elsewhere", **changes)) == []


@pytest.mark.parametrize("program", [TRAIN])
def test_length_is_free_under_a_constant_rate(chosen_program: Program, tmp_path: Path) -> None:
    record = chosen_program.recorded
    plain = {"use_lora": None, "lora_rank": None, "lora_enable": True, "lr_scheduler_type": "constant"}
    now = {"max_steps": 9}
    assert differences(record(tmp_path, **plain), record(tmp_path, **plain, **now)) == []
    assert differences(record(tmp_path), record(tmp_path, **now)), "a linear schedule depends on it"


@pytest.mark.parametrize(("program", "base"), [(TRAIN, BASE), (TEXT, LLAVA / "tiny-vicuna")])
def test_a_base_that_was_moved_and_one_that_was_replaced(base: Path, chosen_program: Program, tmp_path: Path) -> None:
    record = chosen_program.recorded
    shutil.copytree(base, tmp_path / "one")
    then = record(tmp_path / "out", model_name_or_path=tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert differences(then, record(tmp_path / "out", model_name_or_path=tmp_path / "two")) == []
    shutil.copytree(LLAVA / ("tiny-vicuna" if base == BASE else "tiny-llava-v1.5"), tmp_path / "one")
    lines = differences(then, record(tmp_path / "out", model_name_or_path=tmp_path / "one"))
    assert lines == [f"--model_name_or_path: '{tmp_path}/one' then, the same path, other content"]


EDITED = [
    (TRAIN, "data_path", "data.json", "--data_path"),
    (LAVIN, "data_root", "problems.json", "--data_path"),
    (LAVIN, "data_root", "pid_splits.json", "--data_root"),
    (TEXT, "dataset_dir", "train.json", "--dataset_dir"),
]


@pytest.mark.parametrize(("program", "flag", "file", "said"), EDITED)
def test_data_that_were_edited(flag: str, file: str, said: str, chosen_program: Program, tmp_path: Path) -> None:
    """Moved data are the same, edited data are not."""
    record, data = chosen_program.recorded, tmp_path / "data"
    usual = LLAVA / "data" / "finetune.json"
    if flag == "data_path":
        data.mkdir()
        shutil.copyfile(usual, data / file)
    else:
        words = chosen_program.words(tmp_path / "out", {})
        shutil.copytree(words[words.index(f"--{flag}") + 1], data)
    given = {flag: data / file if flag == "data_path" else data}
    then = record(tmp_path / "out")
    moved = differences(then, record(tmp_path / "out", **given))
    assert [line for line in moved if not line.startswith("--image_folder")] == []
    content = json.loads((data / file).read_text())
    content = content[1:] if isinstance(content, list) else dict(list(content.items())[1:])
    (data / file).write_text(json.dumps(content))
    assert [line for line in differences(then, record(tmp_path / "out", **given)) if line.startswith(said)]


@pytest.mark.parametrize("program", PARTS)
def test_records_of_programs_before(chosen_program: Program, tmp_path: Path) -> None:
    """Options that one of two versions does not have, and what was not recorded then, are no differences."""
    then = chosen_program.recorded(tmp_path)
    for key in ("fingerprints", "world_size"):
        del then[key]
    sections = then.get("arguments", then)
    sections.pop("program", None)
    del sections["training"]["weight_decay"]
    assert differences(then, chosen_program.recorded(tmp_path)) == []


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CHANGED: dict[str, tuple[Changes, str]] = {name: cases[0] for name, cases in REFUSED.items()}
RESUME = {TRAIN: "resume_from_checkpoint", LAVIN: "resume", TEXT: "resume_from_checkpoint"}


@pytest.mark.parametrize("what", ["interrupted", "finished", "results alone", "another folder"])
@pytest.mark.parametrize("program", PARTS)
def test_nothing_is_relabeled(what: str, program: str, runs: Callable[[str], Whole], tmp_path: Path) -> None:
    """The refused run leaves every byte as it was."""
    whole = runs(program)
    output = shutil.copytree(whole.folder, tmp_path / "out")
    changes, said = CHANGED[program]
    options = dict(changes)
    if what in ("interrupted", "results alone"):
        shutil.rmtree(output / whole.last.name)
    if what == "results alone":
        shutil.rmtree(output / "checkpoint-2")
    if what == "interrupted":
        for path in [path for path in output.iterdir() if path.name not in ("run.json", "checkpoint-2")]:
            path.unlink() if path.is_file() else shutil.rmtree(path)
    target = output
    if what == "another folder":
        target = tmp_path / "new"
        options |= {RESUME[program]: output / "checkpoint-2"}
    before = state(output)
    with pytest.raises(FlagError, match=rf"(?s)changed options.*{said}.*--output_dir"):
        whole.program.run(target, **options)
    assert state(output) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", ["text", 7, [1]], ids=str)
@pytest.mark.parametrize("section", ["fingerprints", "training", "model", "data", "arguments"])
@pytest.mark.parametrize("program", PARTS)
def test_a_damaged_record_is_named(
    section: str, value: Any, program: str, runs: Callable[[str], Whole], tmp_path: Path
) -> None:
    whole = runs(program)
    folder = whole.copy(tmp_path, recorded=False)
    record = json.loads((folder / "run.json").read_text())
    (record if section in ("fingerprints", "arguments") else record.get("arguments", record))[section] = value
    now = whole.program.recorded(tmp_path)
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=rf"run\.json: .*{section}"):
        refuse_changes(now, tmp_path, folder, results=True)


@pytest.mark.parametrize("program", PARTS)
def test_without_results_there_is_nothing_to_protect(chosen_program: Program, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(chosen_program.recorded(tmp_path)))
    changes, said = CHANGED[chosen_program.name]
    now = chosen_program.recorded(tmp_path, **changes)
    refuse_changes(now, tmp_path, None, results=False)
    with pytest.raises(FlagError, match=said):
        refuse_changes(now, tmp_path, None, results=True)
