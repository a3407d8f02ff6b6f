"""The text experiment: right rows that are kept apart, commands that are accepted, the comparison of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.experiments.common.sizes import Sizes
from benchmarks.experiments.common.steps import marker, run_steps, write_json
from benchmarks.experiments.text import compare, evaluate, table
from benchmarks.experiments.text.base import build_tokenizer, save_untrained
from benchmarks.experiments.text.recipe import SEEDS, Recipe, finetune_command
from benchmarks.experiments.text.tasks import BASE, LETTERS, TASKS, base_rows, draw_rows, held_out_rows, training_rows
from hydralora.text.arguments import parse_args
from llava.errors import CheckpointError, FlagError


def solve(task: str, asked: str) -> str:
    """The answer by other means than the generator's."""
    words = asked.split()
    if task == "add":
        return " ".join(str(int(words[place]) + int(words[place + 3]))[-1] for place in (0, 1))
    if task == "lookup":
        return " ".join("7382905164827395"[ord(word) - ord("a")] for word in words)
    if task == "shift":
        return " ".join((LETTERS * 2)[LETTERS.find(word) + 1] for word in words)
    return " ".join(words[::-1] if task == "reverse" else sorted(words))


def test_answers_are_right() -> None:
    for name, rows in held_out_rows(50).items():
        assert [row["output"] for row in rows] == [solve(name, row["input"]) for row in rows], name


def test_rows_depend_on_the_seed_alone() -> None:
    held_out = held_out_rows(10)
    assert held_out == held_out_rows(10)
    assert training_rows(20, 0, held_out) == training_rows(20, 0, held_out)
    assert training_rows(20, 0, held_out) != training_rows(20, 1, held_out)


def test_no_test_input_is_trained_on_and_none_comes_twice() -> None:
    held_out = held_out_rows(100)
    for seed in SEEDS:
        for name, rows in training_rows(500, seed, held_out).items():
            inputs = [row["input"] for row in rows]
            assert len(set(inputs)) == 500
            assert not set(inputs) & {row["input"] for row in held_out[name]}


def test_the_test_rows_would_be_drawn_otherwise() -> None:
    """The negative control: with so many rows of one seed, some inputs would be those of the test set."""
    add = TASKS[0]
    drawn = {row["input"] for row in draw_rows(add, 0, 4_000, "0")}
    assert drawn & {row["input"] for row in held_out_rows(100)["add"]}


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'next': 17 rows wanted, found 16"):
        draw_rows(BASE[3], 0, 17, "0")


def test_no_task_is_a_family_of_the_base() -> None:
    wordings = [wording for task in (*BASE, *TASKS) for wording in task.instructions]
    assert len(set(wordings)) == len(wordings)


def test_every_word_has_a_token() -> None:
    tokenizer = build_tokenizer()
    rows = [*base_rows(200, 0), *(row for rows in held_out_rows(50).values() for row in rows)]
    for row in rows:
        for part in ("instruction", "input", "output"):
            ids = tokenizer(row[part], add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == row[part]
    assert len(tokenizer) <= Recipe().sizes.vocabulary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small untrained base with a few rows."""
    save_untrained(tmp_path / "base", Sizes(width=16, mlp=24, layers=1, heads=2, vocabulary=128, max_length=64), 0)
    write_json(tmp_path / "rows.json", draw_rows(TASKS[1], 1, 6, "x"))
    return tmp_path


def test_answers_do_not_depend_on_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are padded on the left; without the mask a short row would be answered otherwise beside a long one."""
    rows = json.loads((folder / "rows.json").read_text())
    assert len({len(row["input"]) for row in rows}) > 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "base").eval(), build_tokenizer()
    together = evaluate.answers(model, tokenizer, rows, 64)
    monkeypatch.setattr(evaluate, "BATCH", 1)
    assert together == evaluate.answers(model, tokenizer, rows, 64)
    assert len(set(together)) > 1


def test_exact_match_by_task() -> None:
    rows = [{"task_type": task, "output": "a b"} for task in (0, 0, 1, 1)]
    assert evaluate.accuracies(rows, ["a b", "a", "a b ", "a b"]) == {"0": 0.5, "1": 1.0}


def all_steps(folder: Path) -> list[table.Step]:
    recipe = Recipe()
    return [*table.all_steps(recipe, folder, recipe.methods, SEEDS), *compare.steps(recipe, folder)]


def test_every_step_is_named_once_and_needs_known_steps(tmp_path: Path) -> None:
    steps = all_steps(tmp_path)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert {need for step in steps for need in step.needs} <= set(names)
    compared = {f"change-{name}" for names in compare.sets().values() for name in names}
    assert compared <= set(names)


def test_what_is_done_is_skipped(tmp_path: Path) -> None:
    """Every command would fail here, so one that was run would raise."""
    steps = all_steps(tmp_path)
    for step in steps:
        write_json(marker(tmp_path, step.name), {"minutes": 1.0})
    run_steps(steps, tmp_path, workers=1)
    assert not (tmp_path / "logs").exists()


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "recipe.json", {"rank": 4})
    with pytest.raises(FlagError, match="another recipe"):
        table.prepare(Recipe(), tmp_path)


def test_finetuning_flags(tmp_path: Path) -> None:
    """They are accepted; a run on one task makes as many updates as a run on all."""
    recipe, base, rows = Recipe(), tmp_path / "base", tmp_path / "rows.json"
    base.mkdir()
    rows.write_text("[]")
    updates = set()
    for method in recipe.methods:
        for run in table.runs_of(method, 1, table.NAMES):
            args = parse_args(finetune_command(recipe, run, base, rows, tmp_path / "out")[2:])
            assert args.training.lora_alpha == 2 * args.training.lora_rank
            assert args.training.seed == 1
            count = recipe.rows * (1 if run.task else len(TASKS))
            updates.add(-(-count // args.training.per_device_train_batch_size))
    assert len(updates) == 1


def test_the_change_of_an_adapter(tmp_path: Path) -> None:
    for name, value in (("start", 1.0), ("trained", 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        save_file({"layer.lora_A.weight": torch.full((2, 3), value)}, tmp_path / name / compare.WEIGHTS)
    flags = ["--adapter", str(tmp_path / "trained"), "--output-dir", str(tmp_path / "change"), "--start"]
    compare.main([*flags, str(tmp_path / "start")])
    assert load_file(tmp_path / "change" / compare.WEIGHTS)["layer.lora_A.weight"].eq(2).all()
    save_file({"other": torch.zeros(1)}, tmp_path / "start" / compare.WEIGHTS)
    with pytest.raises(CheckpointError, match="different names"):
        compare.main([*flags, str(tmp_path / "start")])


def test_comparison_table_takes_the_mean_of_a_set(tmp_path: Path) -> None:
    random = Random(0)
    for number, label in enumerate(compare.sets()):
        for kind in ("compare", "compare-change"):
            names = ("cosine_A", "cosine_B", "overlap_A", "overlap_B")
            value = {name: 0.1 * number if kind == "compare" else random.random() for name in names}
            write_json(tmp_path / f"{kind}-{label}" / "similarity.json", {"adapters": {"mean": value}})
    experts = {"experts of x": {"mean": {"cosine_B": 0.25, "overlap_B": 0.5}}}
    write_json(tmp_path / "compare-hydra" / "similarity.json", experts)
    lines = compare.summary_table(tmp_path).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| five tasks, same A at the start | 0.000 | 0.000 |")
    assert lines[3].startswith("| same task, same A at the start, other rows | 0.400 |")  # mean of 0.2 to 0.6
    assert "| - | 0.250 | - | 0.500 | - | - |" in lines[-1]


def test_the_figure_is_made_small(tmp_path: Path) -> None:
    (tmp_path / "compare-tasks").mkdir()
    Image.new("RGB", (4200, 1260), "red").save(tmp_path / "compare-tasks" / "matrices-pca.png")
    compare.copy_figure(tmp_path, tmp_path / "figures")
    with Image.open(tmp_path / "figures" / compare.FIGURE) as figure:
        assert figure.size == (2000, 600)
