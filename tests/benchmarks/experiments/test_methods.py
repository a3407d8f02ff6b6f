"""What both tables of seven methods share, the forks that run their commands, and the flags of the NLVR one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.experiments.common.methods import (
    Method,
    MethodRun,
    Result,
    count_parameters,
    methods_of,
    runs_of,
    seed_table,
    summary_table,
)
from benchmarks.experiments.common.rows import Asked
from benchmarks.experiments.common.steps import Step, StepError, marker, run_steps, write_json
from benchmarks.experiments.nlvr_methods import table
from benchmarks.experiments.nlvr_methods.recipe import SEEDS, TASKS, Recipe, tuned_command
from llava.train.arguments import parse_args


def test_split_adapters_have_the_rank_of_one_together() -> None:
    methods = {method.name: method for method in methods_of(8, TASKS)}
    assert len(methods) == 7
    split = runs_of(methods["split"], 2, TASKS)
    assert [run.task for run in split] == list(TASKS)
    assert sum(run.method.rank for run in split) == methods["lora"].rank == methods["hydra-5"].rank == 8
    assert methods["lora-2r"].rank == 16
    assert [run.name for run in split][:1] == ["split-verify-2"]
    assert runs_of(methods["lora"], 2, TASKS) == [MethodRun(methods["lora"], 2)]
    with pytest.raises(ValueError, match="multiple of 4"):
        methods_of(6, TASKS)


def test_parameters_with_and_without_routers(tmp_path: Path) -> None:
    tensors = {"a.mlp.router.weight": (3, 4), "a.mlp.router_like": (5,), "a.lora_A.weight": (2, 4)}
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    assert count_parameters([tmp_path / "x.safetensors"], frozenset({"router"})) == (25, 12)
    assert count_parameters([tmp_path / "x.safetensors"], frozenset({"lora_router"})) == (25, 0)


METHODS = [Method("lora", "LoRA", 4), Method("hydra-2", "HydraLoRA", 4, 2)]
RESULTS = [
    Result("lora", seed, {"x": value, "y": 0.5}, 1200, 200, minutes)
    for seed, value, minutes in ((1, 0.3, 2.0), (0, 0.1, 1.0), (2, 0.2, 3.0))
]


def test_summary_has_mean_range_and_reference() -> None:
    lines = summary_table(METHODS, ["x", "y"], {"base": {"x": 0.0, "y": 0.4}}, RESULTS).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| base | 0.0 | 40.0 | 20.0 | - | - | - |"
    assert lines[3] == (
        "| LoRA (3 seeds) | 20.0 (10.0 - 30.0) | 50.0 (50.0 - 50.0) | 35.0 (30.0 - 40.0) | 1,200 | 1,000 | 2.0 |"
    )
    assert len(lines) == 4  # no line for a method without results


def test_seed_table_is_in_order() -> None:
    lines = seed_table(METHODS, ["x", "y"], RESULTS).splitlines()
    assert lines[2:] == [
        "| LoRA | 0 | 10.0 | 50.0 | 30.0 | 1.0 |",
        "| LoRA | 1 | 30.0 | 50.0 | 40.0 | 2.0 |",
        "| LoRA | 2 | 20.0 | 50.0 | 35.0 | 3.0 |",
    ]


PROGRAM = """
import sys, os, colorsys
open(sys.argv[1], "a").write(f"{sys.argv[2]} {os.environ['OMP_NUM_THREADS']} ")
print("said so")
sys.exit(int(sys.argv[3]))
"""


def test_commands_run_in_forks(tmp_path: Path) -> None:
    """Arguments, environment, output and exit code are those of a program of its own."""
    program, notes = tmp_path / "program.py", tmp_path / "notes"
    program.write_text(PROGRAM)
    good = Step("good", tuple((str(program), str(notes), word, "0") for word in "ab"))
    bad = Step("bad", ((str(program), str(notes), "c", "3"),), ("good",))
    with pytest.raises(StepError, match=r"bad: a command ended with 3; see .*bad\.log"):
        run_steps([good, bad], tmp_path, workers=1, preload=("colorsys",))
    assert notes.read_text().split() == ["a", "1", "b", "1", "c", "1"]
    assert (tmp_path / "logs" / "good.log").read_text().count("said so") == 2
    assert json.loads(marker(tmp_path, "good").read_text())["cpu_minutes"] > 0
    assert not marker(tmp_path, "bad").exists()


def test_nlvr_steps_are_named_once_and_need_known_steps(tmp_path: Path) -> None:
    recipe = Recipe()
    steps = table.all_steps(recipe, Path("data"), tmp_path, recipe.methods, SEEDS)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) == 2 + 2 * 3 * (6 + 4)
    assert {need for step in steps for need in step.needs} <= set(names)
    for step in steps:
        write_json(marker(tmp_path, step.name), {"minutes": 1.0})
    run_steps(steps, tmp_path, workers=1)  # every command would fail
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("method", Recipe().methods, ids=lambda method: method.name)
def test_nlvr_flags_are_accepted(method: Method, tmp_path: Path) -> None:
    recipe = Recipe()
    (tmp_path / "base" / "vision_tower").mkdir(parents=True)
    (tmp_path / "rows.json").write_text("[]")
    images = tmp_path / "images"
    images.mkdir()
    for run in runs_of(method, 1, TASKS):
        command = tuned_command(recipe, run, tmp_path / "base", tmp_path / "rows.json", images, tmp_path / "out")
        args = parse_args(command[1:])
        assert args.training.freeze_mm_mlp_adapter
        assert args.training.lora_enable  # --use_lora sets it too
        assert list(args.extensions) == (["hydralora"] if method.experts else [])
        count = recipe.rows * (1 if run.task else len(TASKS))
        assert count / args.training.per_device_train_batch_size == recipe.rows * len(TASKS) / recipe.batch


def test_only_finished_results_are_written(tmp_path: Path) -> None:
    """LoRA-split counts when all four of its adapters are scored."""
    recipe = Recipe()
    split = recipe.methods[2]
    for number, run in enumerate(runs_of(split, 1, TASKS)):
        assert table.finished_results(recipe, tmp_path) == []
        scores = {"scores": {run.task: {"accuracy": 0.1 * number}, "all": {"accuracy": 0.9}}}
        write_json(tmp_path / f"score-{run.name}.json", scores)
        write_json(marker(tmp_path, f"score-{run.name}"), {})
        write_json(marker(tmp_path, f"train-{run.name}"), {"cpu_minutes": 1.5})
        (tmp_path / run.name / "checkpoint-9").mkdir(parents=True)
        save_file({"lora_A.weight": torch.zeros(2, 3)}, tmp_path / run.name / "adapter.safetensors")
        save_file({"lora_A.weight": torch.zeros(9, 9)}, tmp_path / run.name / "checkpoint-9" / "adapter.safetensors")
    (result,) = table.finished_results(recipe, tmp_path)
    assert result == Result("split", 1, {task: 0.1 * n for n, task in enumerate(TASKS)}, 24, 0, 6.0)


def asked_of_all_tasks() -> list[Asked]:
    return [Asked(f"images/s-{n}-0.png", task, f"{task}?", str(n)) for n in range(3) for task in TASKS]


def test_a_row_of_the_mixture_is_of_one_task() -> None:
    recipe = Recipe(rows=5)
    mixture = table.mixture(asked_of_all_tasks(), recipe, 0)
    assert list(mixture) == list(TASKS)
    for task, rows in mixture.items():
        assert len(rows) == 5
        assert {turn["value"].removeprefix("<image>\n") for row in rows for turn in row["conversations"][::2]} == {
            f"{task}?"
        }
    assert mixture != table.mixture(asked_of_all_tasks(), recipe, 1)


def test_one_image_in_so_many_is_asked_about(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.png", "category": task, "question_id": f"{n}{task}"} for n in range(5) for task in TASKS]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = table.chosen_questions(tmp_path, 2)
    for task in TASKS:
        assert [json.loads(line)["image"] for line in chosen[task]] == ["0.png", "2.png", "4.png"]
