"""The whole table: data, three bases, LoRA and HydraLoRA on each, answers, scores, and the README next to this file.

    python -m benchmarks.experiments.nlvr.table --data data/nlvr --output-dir checkpoints/nlvr

Run from the root of the repository. The same command again continues after an interruption; what is done stays.
`--rehearsal N` shortens every run to N rows and fills no document.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.experiments.common import tiny
from benchmarks.experiments.common.report import command_block, fill_document
from benchmarks.experiments.common.rows import (
    blind_accuracy,
    conversation_rows,
    majority_accuracy,
    read_questions,
    read_train,
)
from benchmarks.experiments.common.steps import Step, marker, run_steps, same_recipe, write_json
from benchmarks.experiments.nlvr import report
from benchmarks.experiments.nlvr.recipe import METHODS, SEEDS, TEMPLATE, Recipe, base_flags, common_flags, tuned_flags

DOCUMENT = Path(__file__).with_name("README.md")
"""Where the tables go."""
DOCUMENTED_PATHS = Path("data/nlvr"), Path("checkpoints/nlvr")


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.json, val.jsonl and images/")
    parser.add_argument("--output-dir", type=Path, required=True, help="everything that is made goes here")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--rehearsal", type=int, default=None, help="rows in every run, to try the whole way quickly")
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe, shortened for a rehearsal."""
    recipe = Recipe()
    if args.rehearsal is None:
        return recipe
    return replace(
        recipe,
        base=replace(recipe.base, rows=args.rehearsal),
        tuned=replace(recipe.tuned, rows=args.rehearsal),
    )


def prepare(recipe: Recipe, data: Path, folder: Path) -> None:
    """Write training rows, tokenizer and untrained models of all seeds, and note the recipe.

    Raises:
        FlagError: the folder was prepared with another recipe.
    """
    if same_recipe(folder, asdict(recipe)):
        return
    asked = read_train(data / "train.json")
    tokenizer = tiny.train_tokenizer(tiny.tokenizer_text(asked, TEMPLATE), recipe.sizes.vocabulary)
    for seed in SEEDS:
        for kind, training in (("base", recipe.base), ("tuned", recipe.tuned)):
            rows = conversation_rows(asked, training.turns, training.rows, seed)
            write_json(folder / f"{kind}-{seed}.json", rows)
        start = folder / f"start-{seed}"
        tiny.save_tower(start / "tower", recipe.sizes, seed)
        tiny.save_language_model(start / "llm", recipe.sizes, seed)
        tiny.save_tokenizer(start / "llm", tokenizer, recipe.sizes.max_length)
    write_json(folder / "recipe.json", asdict(recipe))


def training_step(recipe: Recipe, method: str, seed: int, data: Path, folder: Path) -> Step:
    """Training of one run."""
    output, base = folder / f"{method}-{seed}", folder / f"base-{seed}"
    if method == "base":
        flags = base_flags(folder / f"start-{seed}" / "llm", folder / f"start-{seed}" / "tower")
    else:
        flags = tuned_flags(recipe, method, base)
    rows = folder / f"{'base' if method == 'base' else 'tuned'}-{seed}.json"
    command = ("llava/train/train_mem.py", *flags, *common_flags(recipe, method, rows, data, seed, output))
    return Step(f"train-{method}-{seed}", (command,), () if method == "base" else (f"train-base-{seed}",))


def evaluation_step(method: str, seed: int, data: Path, folder: Path) -> Step:
    """Answers to all questions, and their score."""
    checkpoint, answers = folder / f"{method}-{seed}", folder / f"answers-{method}-{seed}.jsonl"
    base = () if method == "base" else ("--model-base", str(folder / f"base-{seed}"))
    questions = ("--question-file", str(data / "val.jsonl"), "--answers-file", str(answers))
    answer = (
        *("-m", "llava.eval.model_vqa_loader", "--model-path", str(checkpoint), *base, *questions),
        *("--image-folder", str(data), "--conv-mode", TEMPLATE, "--temperature", "0"),
        *("--max_new_tokens", "8", "--batch-size", "64", "--num-workers", "1", "--device", "cpu"),
    )
    output = ("--output", str(folder / f"score-{method}-{seed}.json"))
    score = ("-m", "llava.eval.score", *questions, *output)
    return Step(f"score-{method}-{seed}", (answer, score), (f"train-{method}-{seed}",))


def all_steps(recipe: Recipe, data: Path, folder: Path) -> list[Step]:
    """Every step, each training followed by its evaluation; the bases first, which take longest."""
    steps = []
    for method in METHODS:
        for seed in SEEDS:
            steps += [training_step(recipe, method, seed, data, folder), evaluation_step(method, seed, data, folder)]
    return steps


def finished_results(folder: Path) -> list[report.Result]:
    """Results of all runs whose score is there."""
    return [
        report.read_result(
            method,
            seed,
            folder / f"{method}-{seed}",
            folder / f"score-{method}-{seed}.json",
            marker(folder, f"train-{method}-{seed}"),
        )
        for method in METHODS
        for seed in SEEDS
        if marker(folder, f"score-{method}-{seed}").exists()
    ]


def documented_commands(recipe: Recipe) -> list[tuple[str, ...]]:
    """The commands that README.md shows: all of the first seed, with the paths of the documented call."""
    steps = all_steps(recipe, *DOCUMENTED_PATHS)
    return [command for step in steps if step.name.endswith(f"-{SEEDS[0]}") for command in step.commands]


def write_document(document: Path, recipe: Recipe, data: Path, folder: Path) -> None:
    """Fill tables and commands into README.md.

    Raises:
        DocumentError: it lacks the marked places.
    """
    train, questions = read_train(data / "train.json"), read_questions(data / "val.jsonl")
    baselines = {
        "majority answer": majority_accuracy(questions),
        "blind (question only)": blind_accuracy(train, questions),
    }
    results = finished_results(folder)
    contents = {
        "nlvr table": report.summary_table(baselines, results),
        "nlvr seeds": report.seed_table(results),
        "nlvr commands": command_block(documented_commands(recipe)),
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
    steps = all_steps(recipe, args.data, args.output_dir)
    run_steps(steps, args.output_dir, args.workers)
    if args.rehearsal is None:
        write_document(DOCUMENT, recipe, args.data, args.output_dir)
        print(f"written to {DOCUMENT}")


if __name__ == "__main__":
    main()
