"""The whole table: one base, seven kinds of adapters on it with three seeds each, answers, and the README here.

    python -m benchmarks.experiments.nlvr_methods.table --data data/nlvr --output-dir checkpoints/nlvr-methods

Run from the root of the repository. The same command again continues after an interruption; what is done stays.
`--only-seed 0 --only-method lora` stops after one line: the recipe was settled on that one. `--rehearsal N` shortens
every run to N rows; neither fills README.md. `--write` runs nothing and fills in what is done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.experiments.common import tiny
from benchmarks.experiments.common.methods import (
    Method,
    MethodRun,
    Result,
    count_parameters,
    runs_of,
    seed_table,
    summary_table,
)
from benchmarks.experiments.common.report import command_block, fill_document
from benchmarks.experiments.common.rows import (
    Asked,
    Row,
    blind_accuracy,
    conversation_rows,
    majority_accuracy,
    read_questions,
    read_train,
)
from benchmarks.experiments.common.steps import Step, marker, run_steps, same_recipe, write_json
from benchmarks.experiments.nlvr.recipe import TEMPLATE
from benchmarks.experiments.nlvr.table import training_step
from benchmarks.experiments.nlvr_methods.recipe import BASE_SEED, SEEDS, TASKS, Recipe, tuned_command
from llava.runtime.output import replace_text

DOCUMENT = Path(__file__).with_name("README.md")
"""Where the tables go."""
DOCUMENTED_PATHS = Path("data/nlvr"), Path("checkpoints/nlvr-methods")
SHOWN = ("train-split-count-0", "train-hydra-3-0")
"""Steps whose commands README.md shows."""
PRELOAD = (
    "llava.train.train",
    "llava.train.llava_trainer",
    "llava.eval.answering.runner",
    "llava.eval.answering.options",
    "hydralora",
)
BASE = f"base-{BASE_SEED}"


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.json, val.jsonl and images/")
    parser.add_argument("--output-dir", type=Path, required=True, help="everything that is made goes here")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--only-method", help="name of one method, for example lora")
    parser.add_argument("--only-seed", type=int, help="one of the seeds")
    parser.add_argument("--rehearsal", type=int, default=None, help="rows in every run, to try the whole way quickly")
    parser.add_argument("--write", action="store_true", help="run nothing, write what is done into README.md")
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe, shortened for a rehearsal."""
    recipe = Recipe()
    if args.rehearsal is None:
        return recipe
    return replace(recipe, base=replace(recipe.base, rows=args.rehearsal), rows=args.rehearsal, every=100)


def mixture(asked: Sequence[Asked], recipe: Recipe, seed: int) -> dict[str, list[Row]]:
    """Training rows of each task; a row's questions are of one task."""
    return {
        task: conversation_rows(
            [one for one in asked if one.task == task], {task: recipe.turns[task]}, recipe.rows, f"{seed}/{task}"
        )
        for task in TASKS
    }


def chosen_questions(data: Path, every: int) -> dict[str, list[str]]:
    """Lines of `val.jsonl` of each task, those of one in `every` test images."""
    images: dict[str, int] = {}
    lines: dict[str, list[str]] = {task: [] for task in TASKS}
    for line in (data / "val.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if images.setdefault(row["image"], len(images)) % every == 0:
            lines[row["category"]].append(line)
    return lines


def prepare(recipe: Recipe, data: Path, folder: Path) -> None:
    """Write rows, questions, tokenizer and the untrained model, and note the recipe.

    Raises:
        FlagError: the folder was prepared with another recipe.
    """
    if same_recipe(folder, asdict(recipe)):
        return
    asked = read_train(data / "train.json")
    prepare_base(recipe, asked, folder)
    for seed in SEEDS:
        rows = mixture(asked, recipe, seed)
        for task in TASKS:
            write_json(folder / f"train-{task}-{seed}.json", rows[task])
        write_json(folder / f"train-{seed}.json", [row for task in TASKS for row in rows[task]])
    questions = chosen_questions(data, recipe.every)
    for task in TASKS:
        replace_text(folder / f"questions-{task}.jsonl", "\n".join(questions[task]) + "\n", check=False)
    every = [line for task in TASKS for line in questions[task]]
    replace_text(folder / "questions.jsonl", "\n".join(every) + "\n", check=False)
    write_json(folder / "recipe.json", asdict(recipe))


def prepare_base(recipe: Recipe, asked: Sequence[Asked], folder: Path) -> None:
    """Write rows, tokenizer and untrained models of the base."""
    write_json(folder / f"{BASE}.json", conversation_rows(asked, recipe.base.turns, recipe.base.rows, BASE_SEED))
    start = folder / f"start-{BASE_SEED}"
    tokenizer = tiny.train_tokenizer(tiny.tokenizer_text(asked, TEMPLATE), recipe.sizes.vocabulary)
    tiny.save_tower(start / "tower", recipe.sizes, BASE_SEED)
    tiny.save_language_model(start / "llm", recipe.sizes, BASE_SEED)
    tiny.save_tokenizer(start / "llm", tokenizer, recipe.sizes.max_length)


def questions_of(folder: Path, task: str | None) -> Path:
    """Question file of one task, or of all."""
    return folder / f"{'-'.join(filter(None, ['questions', task]))}.jsonl"


def score_step(name: str, task: str | None, base: Path | None, data: Path, folder: Path) -> Step:
    """Answers of the checkpoint `name`, and their score."""
    answers = folder / f"answers-{name}.jsonl"
    questions = ("--question-file", str(questions_of(folder, task)), "--answers-file", str(answers))
    answer = (
        *("-m", "llava.eval.model_vqa_loader", "--model-path", str(folder / name)),
        *(() if base is None else ("--model-base", str(base))),
        *questions,
        *("--image-folder", str(data), "--conv-mode", TEMPLATE, "--temperature", "0"),
        *("--max_new_tokens", "8", "--batch-size", "128", "--num-workers", "0", "--device", "cpu"),
    )
    score = ("-m", "llava.eval.score", *questions, "--output", str(folder / f"score-{name}.json"))
    return Step(f"score-{name}", (answer, score), (f"train-{name}",))


def steps_of(run: MethodRun, recipe: Recipe, data: Path, folder: Path) -> list[Step]:
    """Training of one adapter and its answers, to all questions or to those of its task."""
    rows, base = folder / f"{run.data_name}.json", folder / BASE
    command = tuned_command(recipe, run, base, rows, data, folder / run.name)
    return [
        Step(f"train-{run.name}", (command,), (f"train-{BASE}",)),
        score_step(run.name, run.task, base, data, folder),
    ]


def all_steps(recipe: Recipe, data: Path, folder: Path, methods: Sequence[Method], seeds: Sequence[int]) -> list[Step]:
    """Every step; the base first, then seed by seed."""
    steps = [
        training_step(recipe.as_larger, "base", BASE_SEED, data, folder),
        score_step(BASE, None, None, data, folder),
    ]
    for seed in seeds:
        for method in methods:
            for run in runs_of(method, seed, TASKS):
                steps += steps_of(run, recipe, data, folder)
    return steps


def read_scores(folder: Path, name: str) -> dict[str, float]:
    """Accuracy by task of a scored checkpoint."""
    scores = json.loads((folder / f"score-{name}.json").read_text(encoding="utf-8"))["scores"]
    return {task: scores[task]["accuracy"] for task in TASKS if task in scores}


def read_result(folder: Path, method: Method, seed: int) -> Result:
    """Result of a method whose runs with this seed are scored."""
    accuracy: dict[str, float] = {}
    total = routers = 0
    minutes = 0.0
    for run in runs_of(method, seed, TASKS):
        accuracy |= read_scores(folder, run.name)
        files = [
            path
            for path in (folder / run.name).rglob("*.safetensors")
            if not path.relative_to(folder / run.name).parts[0].startswith("checkpoint-")
        ]
        counts = count_parameters(files, frozenset({"router"}))
        total, routers = total + counts[0], routers + counts[1]
        minutes += json.loads(marker(folder, f"train-{run.name}").read_text(encoding="utf-8"))["cpu_minutes"]
    return Result(method.name, seed, accuracy, total, routers, minutes)


def finished_results(recipe: Recipe, folder: Path) -> list[Result]:
    """Results of all methods and seeds whose runs are scored."""
    return [
        read_result(folder, method, seed)
        for method in recipe.methods
        for seed in SEEDS
        if all(marker(folder, f"score-{run.name}").exists() for run in runs_of(method, seed, TASKS))
    ]


def documented_commands(recipe: Recipe) -> list[tuple[str, ...]]:
    """The commands that README.md shows, with the paths of the documented call."""
    steps = {step.name: step for step in all_steps(recipe, *DOCUMENTED_PATHS, recipe.methods, SEEDS)}
    return [command for name in SHOWN for command in steps[name].commands]


def write_document(document: Path, recipe: Recipe, data: Path, folder: Path) -> None:
    """Fill tables and commands into README.md.

    Raises:
        DocumentError: it lacks the marked places.
    """
    questions = read_questions(questions_of(folder, None))
    references = {
        "majority answer": majority_accuracy(questions),
        "blind (question only)": blind_accuracy(read_train(data / "train.json"), questions),
        "base": read_scores(folder, BASE),
    }
    results = finished_results(recipe, folder)
    contents = {
        "nlvr methods table": summary_table(recipe.methods, TASKS, references, results),
        "nlvr methods seeds": seed_table(recipe.methods, TASKS, results),
        "nlvr methods commands": command_block(documented_commands(recipe)),
    }
    fill_document(document, contents)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        LlavaError: data or options are wrong, or a step failed; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    recipe = recipe_of(args)
    prepare(recipe, args.data, args.output_dir)
    methods = [method for method in recipe.methods if args.only_method in (None, method.name)]
    seeds = [seed for seed in SEEDS if args.only_seed in (None, seed)]
    steps = all_steps(recipe, args.data, args.output_dir, methods, seeds)
    if not args.write:
        run_steps(steps, args.output_dir, args.workers, PRELOAD)
    if args.rehearsal is None and args.only_method is None and args.only_seed is None:
        write_document(DOCUMENT, recipe, args.data, args.output_dir)
        print(f"written to {DOCUMENT}")


if __name__ == "__main__":
    main()
