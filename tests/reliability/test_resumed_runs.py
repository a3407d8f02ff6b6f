"""A resume is a promise: the run continues as it was started, or every difference is named and recorded.

`run.json` says what was used, is written once, and gets a second record only where changes were accepted. Holds for
each of the three training programs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import CheckpointError, FlagError
from llava.runtime.resumed_schedule import check_length
from llava.runtime.unchanged import batch_shares, differences
from llava.runtime.weights.run_file import latest
from tests.reliability.programs import PARTS, Program, Whole

TRAIN, LAVIN, TEXT = PARTS
ALPHA = {TRAIN: {"lora_alpha": 64}, LAVIN: {"adapter_scale": 0.5}, TEXT: {"lora_alpha": 64}}
RATE = {TRAIN: {"learning_rate": 0.002}, LAVIN: {"lr": 0.002}, TEXT: {"learning_rate": 0.002}}
DECAY = {"weight_decay": 0.25}
RESUME = {TRAIN: "resume_from_checkpoint", LAVIN: "resume", TEXT: "resume_from_checkpoint"}
ACCEPTED = {"resume_changed": True}
TITLES = ("Training finished", "Finished ")

Runs = Callable[[str], Whole]


@pytest.fixture
def whole(program: str, runs: Runs) -> Whole:
    """The finished run of the program that a test is about."""
    return runs(program)


@pytest.fixture
def chosen_program(program: str, training_programs: dict[str, Program]) -> Program:
    """The program that a test is about."""
    return training_programs[program]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def interrupted(whole: Whole, output: Path) -> Path:
    """What a run leaves that was killed after its second update; returns the checkpoint."""
    folder = whole.copy(output)
    shutil.copyfile(whole.folder / "run.json", output / "run.json")
    return folder


def rates(folder: Path) -> list[float]:
    """The learning rates of the updates after the second one."""
    history = read(folder / "trainer_state.json")["log_history"]
    return [entry["learning_rate"] for entry in history if "learning_rate" in entry and entry["step"] > 2]


def groups(folder: Path) -> list[dict[str, Any]]:
    """The settings of the optimizer in a checkpoint."""
    return torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]


# The record of a run


@pytest.mark.parametrize("program", PARTS)
def test_the_record_is_written_once(whole: Whole, tmp_path: Path) -> None:
    """Resuming an interrupted run and starting a finished one again leave every byte of it."""
    interrupted(whole, tmp_path)
    written = (tmp_path / "run.json").read_bytes()
    assert read(whole.folder / "run.json")["started"]
    for _ in ("interrupted", "finished"):
        found = whole.program.run(tmp_path, logging_steps=2, save_steps=3)
        assert (tmp_path / "run.json").read_bytes() == written
        assert found.keys() == whole.trained.keys()
        assert all(torch.equal(found[name], whole.trained[name]) for name in found)
    assert read(tmp_path / whole.last.name / "run.json") == read(tmp_path / "run.json")


@pytest.mark.parametrize("program", PARTS)
def test_a_run_that_continues_elsewhere_keeps_its_record(whole: Whole, tmp_path: Path) -> None:
    whole.program.run(tmp_path / "new", **{RESUME[whole.program.name]: whole.folder / "checkpoint-2"})
    assert read(tmp_path / "new" / "run.json") == read(whole.folder / "run.json")


@pytest.mark.parametrize("program", PARTS)
def test_accepted_changes_are_named_and_appended(
    whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused without the flag; with it, said, recorded once after the first record, and compared with later."""
    changes = ALPHA[whole.program.name] | DECAY
    interrupted(whole, tmp_path)
    first = read(tmp_path / "run.json")
    with pytest.raises(FlagError, match="--resume_changed True") as refused:
        whole.program.run(tmp_path, **changes)
    assert all(f"--{name}: " in str(refused.value) for name in changes)
    capsys.readouterr()
    whole.program.run(tmp_path, **changes, **ACCEPTED)
    said = capsys.readouterr().out
    assert all(f"--{name}: " in said for name in changes)

    record = read(tmp_path / "run.json")
    (second,) = record.pop("resumes")
    assert record == first
    assert {line.partition(":")[0] for line in second["changed"]} >= {f"--{name}" for name in changes}
    assert second["resumed_from"].endswith("checkpoint-2")
    assert differences(second, whole.program.recorded(tmp_path, **changes)) == []
    assert differences(first, whole.program.recorded(tmp_path)) == []
    assert read(tmp_path / whole.last.name / "run.json") == read(tmp_path / "run.json")

    written = (tmp_path / "run.json").read_bytes()
    shutil.rmtree(tmp_path / whole.last.name)
    whole.program.run(tmp_path, **changes, **ACCEPTED)  # the same command again
    assert (tmp_path / "run.json").read_bytes() == written
    whole.program.run(tmp_path, **changes)  # its last checkpoint knows of the changes
    with pytest.raises(FlagError, match="changed options"):
        whole.program.run(tmp_path)


@pytest.mark.parametrize("program", PARTS)
def test_accepted_changes_have_an_effect(whole: Whole, tmp_path: Path) -> None:
    """Optimizer and schedule of a checkpoint contain the rate and decay of then."""
    changes = RATE[whole.program.name] | DECAY
    interrupted(whole, tmp_path)
    found = whole.program.run(tmp_path, **changes, **ACCEPTED)
    (value,) = RATE[whole.program.name].values()
    assert rates(tmp_path) == pytest.approx([rate * value / 0.01 for rate in rates(whole.folder)], rel=1e-6)
    new, old = groups(tmp_path / whole.last.name), groups(whole.last)
    assert {0.25} == {group["weight_decay"] for group in new} - {0.0}
    assert [group["weight_decay"] for group in new] != [group["weight_decay"] for group in old]
    assert any(not torch.equal(found[name], whole.trained[name]) for name in found)


@pytest.mark.parametrize("program", PARTS)
def test_another_optimizer_is_never_accepted(whole: Whole, tmp_path: Path) -> None:
    interrupted(whole, tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(FlagError, match=r"(?s)another optimizer.*--optim: 'adamw_torch(_fused)?' then, 'sgd' now"):
        whole.program.run(tmp_path, optim="sgd", **ACCEPTED)
    assert (tmp_path / "run.json").read_bytes() == before


# Finished runs


@pytest.mark.parametrize("changes", ["options that decide numbers", "others"])
@pytest.mark.parametrize("program", PARTS)
def test_a_finished_run_is_not_reported_as_trained(
    changes: str, whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(whole.folder, tmp_path / "out")
    capsys.readouterr()
    if changes == "others":
        whole.program.run(output, logging_steps=3)
        assert "Nothing was left to train" in capsys.readouterr().out
    else:
        record = (output / "run.json").read_bytes()
        for accepted in ({}, ACCEPTED):
            with pytest.raises(FlagError, match=f"--{next(iter(ALPHA[whole.program.name]))}: "):
                whole.program.run(output, **ALPHA[whole.program.name], **accepted)
        assert (output / "run.json").read_bytes() == record
    printed = capsys.readouterr().out
    assert not [title for title in TITLES if title in printed]


@pytest.mark.parametrize("program", PARTS)
def test_a_new_run_says_that_it_has_finished(whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control of the test above."""
    interrupted(whole, tmp_path)
    whole.program.run(tmp_path)
    printed = capsys.readouterr().out
    assert [title for title in TITLES if title in printed]


@pytest.mark.parametrize("program", [TRAIN])
def test_results_of_another_run_are_not_replaced(whole: Whole, tmp_path: Path) -> None:
    output, source = shutil.copytree(whole.folder, tmp_path / "out"), tmp_path / "other"
    whole.program.run(source, lora_alpha=64)
    with pytest.raises(FlagError, match=r"(?s)cannot be replaced.*--lora_alpha: 8 then, 64 now"):
        whole.program.run(output, lora_alpha=64, resume_from_checkpoint=source / "checkpoint-2")


# Weights without the state of an optimizer


@pytest.mark.parametrize("program", PARTS)
def test_weights_alone_are_refused(whole: Whole, tmp_path: Path) -> None:
    """Whatever folder they are in: the output folder of a run, one without checkpoints, one of --save_only_model."""
    name, program = RESUME[whole.program.name], whole.program
    with pytest.raises(CheckpointError, match=rf"is the output folder of a run.*resume from .*{whole.last.name}"):
        program.run(tmp_path / "new", **{name: whole.folder})
    alone = shutil.copytree(whole.folder, tmp_path / "alone", ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(CheckpointError, match=r"alone: .*optimizer\.pt is missing.*new schedule.*another --output_dir"):
        program.run(tmp_path / "new", **{name: alone})
    program.run(tmp_path / "weights", save_only_model=True)
    with pytest.raises(CheckpointError, match=r"--save_only_model.*optimizer\.pt.*another --output_dir"):
        program.run(tmp_path / "new", **{name: tmp_path / "weights" / "checkpoint-2"})
    assert not (tmp_path / "new").exists()


# The schedule


LENGTHS = [(8, 8, False, []), (8, 9, True, ["updates of the whole run: 8 then, 9 now"])]


@pytest.mark.parametrize(("planned", "updates", "may_differ", "expected"), LENGTHS)
def test_lengths_that_continue(planned: int, updates: int, may_differ: bool, expected: list, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 2, "max_steps": planned}))
    assert check_length(tmp_path, updates, may_differ, []) == expected


@pytest.mark.parametrize(
    ("made", "updates", "may_differ", "changes", "said"),
    [
        (2, 9, False, [], "changed schedule.*updates of the whole run: 8 then, 9 now"),
        (4, 3, True, [], "has made 4 updates, more than the 3"),
        (8, 8, True, ["--seed: 1 then, 2 now"], "all 8 updates.*--seed"),
    ],
)
def test_lengths_that_do_not(
    made: int, updates: int, may_differ: bool, changes: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": made, "max_steps": 8}))
    with pytest.raises(FlagError, match=f"(?s){said}"):
        check_length(tmp_path, updates, may_differ, changes)


@pytest.mark.parametrize("program", PARTS)
def test_a_schedule_that_no_option_shows(whole: Whole, tmp_path: Path) -> None:
    """A record that says nothing of the data; the number of updates is in the checkpoint all the same."""
    folder = interrupted(whole, tmp_path)
    (folder / "checkpoint_files.json").unlink()
    state = read(folder / "trainer_state.json")
    (folder / "trainer_state.json").write_text(json.dumps(state | {"max_steps": 7}))
    with pytest.raises(FlagError, match=r"(?s)trainer_state\.json.*updates of the whole run: 7 then"):
        whole.program.run(tmp_path)
    whole.program.run(tmp_path, **ACCEPTED)
    (second,) = read(tmp_path / "run.json")["resumes"]
    assert second["changed"] == [f"updates of the whole run: 7 then, {state['max_steps']} now"]


@pytest.mark.parametrize("program", [TRAIN])
def test_a_shorter_run_is_not_finished(chosen_program: Program, tmp_path: Path) -> None:
    """Where the length is free: fewer updates than were made are not a finished run, more are made."""
    plain = {"use_lora": None, "lora_rank": None, "lora_enable": True, "lr_scheduler_type": "constant"}
    chosen_program.run(tmp_path, **plain)
    with pytest.raises(FlagError, match="has made 3 updates, more than the 2"):
        chosen_program.run(tmp_path, **plain, max_steps=2)
    record = (tmp_path / "run.json").read_bytes()
    chosen_program.run(tmp_path, **plain, max_steps=4, save_steps=1)
    assert (tmp_path / "checkpoint-4").is_dir()
    assert read(tmp_path / "run.json")["arguments"]["training"]["max_steps"] == 3
    assert read(tmp_path / "run.json").keys() - json.loads(record).keys() == {"resumes"}


@pytest.mark.parametrize("program", PARTS)
def test_how_often_to_save_is_what_the_options_of_now_say(whole: Whole, tmp_path: Path) -> None:
    interrupted(whole, tmp_path)
    whole.program.run(tmp_path, save_steps=1, logging_steps=1)
    saved = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert saved == {f"checkpoint-{number}" for number in range(2, int(whole.last.name[-1]) + 1)}


# What a record says


SHARES: dict[str, tuple[dict[str, Any], ...]] = {
    TRAIN: ({"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 1}),
    LAVIN: ({"batch_size": 4}, {"batch_size": 2}),
    TEXT: ({"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 1}),
}


@pytest.mark.parametrize("program", PARTS)
def test_the_global_batch_is_compared(chosen_program: Program, tmp_path: Path) -> None:
    """One process with 2 rows is two processes with 1 each; two processes with 2 each are not."""
    large, small = (chosen_program.recorded(tmp_path, **share) for share in SHARES[chosen_program.name])
    rows = batch_shares(large)
    assert rows is not None
    two_of_one, two_of_two = small | {"world_size": 2}, large | {"world_size": 2}
    assert batch_shares(two_of_one) == (2, rows[1], rows[2] // 2)
    assert differences(large, two_of_one) == []
    assert [line for line in differences(large, two_of_two) if line.startswith("global batch: ")]
    assert [line for line in differences(large, small) if line.startswith("global batch: ")]


@pytest.mark.parametrize("program", PARTS)
def test_another_share_of_the_same_batch_is_said(
    whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(whole, tmp_path)
    half: dict[str, dict[str, Any]] = {
        TRAIN: {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        LAVIN: {"batch_size": 2, "accum_iter": 4},
        TEXT: {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    }
    capsys.readouterr()
    whole.program.run(tmp_path, **half[whole.program.name])
    assert "the global batch is the same, as " in capsys.readouterr().out
    assert "resumes" not in read(tmp_path / "run.json")


def settings(record: dict[str, Any]) -> set[str]:
    """Names of all settings in a record."""
    sections = record.get("arguments", record)
    names = {name for part in ("program", "model", "data", "training") for name in sections.get(part) or {}}
    return names | {name for options in (sections.get("options") or {}).values() for name in options}


UNUSED: dict[str, list[tuple[dict[str, Any], set[str], set[str]]]] = {
    TRAIN: [
        ({}, {"lora_r", "lora_alpha", "max_steps", "llm_moe_num_experts", "mm_projector_lr"}, {"num_train_epochs"}),
        ({}, set(), {"vision_keep_rate", "predictor_lr", "adapter_type", "hidden_proj", "hydralora_rank"}),
        ({}, set(), {"double_quant", "quant_type", "mm_vision_tower_lr", "image_grid_pinpoints", "mpt_attn_impl"}),
        ({}, set(), {"eval_steps", "metric_for_best_model", "hub_strategy", "fsdp_config", "do_train"}),
        ({"max_steps": -1, "num_train_epochs": 1}, {"num_train_epochs"}, set()),
        (
            {"use_lora": None, "lora_rank": None, "lora_alpha": None},
            {"lora_enable"},
            {"lora_r", "lora_alpha", "lora_dropout", "use_lora"},
        ),
        ({"llm_moe": False}, {"lora_r", "lora_alpha"}, {"llm_moe_num_experts", "moe_balance_w", "dense_moe"}),
        ({"freeze_mm_mlp_adapter": True, "mm_projector_lr": None}, set(), {"mm_projector_lr"}),
        ({"optim": "sgd"}, {"weight_decay"}, {"adam_beta1", "adam_epsilon"}),
        ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type"}, {"warmup_steps"}),
    ],
    LAVIN: [
        ({}, {"lr", "epochs", "warmup_epochs", "prompt_format", "adapter_type"}, {"blr", "n_prompt", "cpu_load"}),
        ({}, {"use_caption", "data_root"}, {"caption_file", "lora_r", "lora_alpha", "vicuna_weights"}),
        ({}, set(), {"warmup_steps", "lr_scheduler_type", "lora_rank", "vision_keep_rate", "dist_url"}),
        ({"use_caption": ""}, {"caption_file"}, set()),
    ],
    TEXT: [
        ({}, {"lora_rank", "lora_alpha", "max_steps", "do_train"}, {"num_train_epochs", "keep_linebreaks"}),
        ({}, set(), {"validation_split_percentage", "double_quant", "quant_type", "use_fast_tokenizer"}),
        ({"do_eval": True}, {"validation_split_percentage"}, set()),
    ],
}


@pytest.mark.parametrize(
    ("program", "changes", "used", "unused"), [(name, *case) for name, cases in UNUSED.items() for case in cases]
)
def test_settings_that_are_not_used_are_not_recorded(
    changes: dict[str, Any], used: set[str], unused: set[str], chosen_program: Program, tmp_path: Path
) -> None:
    names = settings(chosen_program.recorded(tmp_path, **changes))
    assert used <= names
    assert not unused & names


@pytest.mark.parametrize("program", PARTS)
def test_values_are_those_that_hold(chosen_program: Program, tmp_path: Path) -> None:
    record = chosen_program.recorded(tmp_path)
    training = record.get("arguments", record)["training"]
    assert training["data_seed"] == training["seed"] == record["seed"]
    assert "None" not in training.values()


IDLE: dict[str, list[dict[str, Any]]] = {
    TRAIN: [{"num_train_epochs": 9}, {"quant_type": "fp4"}],
    LAVIN: [{"blr": 0.5}, {"data_path": "/elsewhere"}],
    TEXT: [{"num_train_epochs": 9}, {"quant_type": "fp4"}, {"validation_split_percentage": 0.5}],
}


@pytest.mark.parametrize(
    ("program", "changes"), [(name, changes) for name, cases in IDLE.items() for changes in cases], ids=str
)
def test_settings_that_are_not_used_may_change(
    changes: dict[str, Any], chosen_program: Program, tmp_path: Path
) -> None:
    assert differences(chosen_program.recorded(tmp_path), chosen_program.recorded(tmp_path, **changes)) == []


@pytest.mark.parametrize("program", [TEXT])
def test_an_evaluation_alone_replaces_no_record(whole: Whole, tmp_path: Path) -> None:
    output = shutil.copytree(whole.folder, tmp_path / "out")
    written = (output / "run.json").read_bytes()
    words = whole.program.words(output, {"do_train": None, "do_eval": True})
    data = Path(words[words.index("--dataset_dir") + 1]) / "train.json"
    whole.program.main([*words, "--validation_file", str(data)])
    assert (output / "run.json").read_bytes() == written


def test_the_latest_record_holds() -> None:
    first, second = {"arguments": {"seed": 1}, "started": "a"}, {"arguments": {"seed": 2}, "started": "b"}
    assert latest(first) == first
    assert latest(first | {"resumes": []}) == first
    assert latest(first | {"resumes": [first, second]}) == second
