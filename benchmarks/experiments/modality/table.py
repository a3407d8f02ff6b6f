"""MMA, adapters without router and LoRA on rows with and without an image: base, runs, answers, README.

    python -m benchmarks.experiments.modality.table --data data/nlvr --output-dir checkpoints/modality

Run from the root of the repository. The same command again continues after an interruption; what is done stays. The
base is that of `benchmarks.experiments.nlvr_methods.table`: its folder `base-0` and `steps/train-base-0.json`, copied
into the output folder, spare the time of making it. `--pilots` trains the first seed at several rates and prints the
losses: the rates were settled so, and the pilots at those rates are runs of the table. `--rehearsal N` shortens every
run to N rows; neither fills README.md. `--write` runs nothing and fills in what is done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.experiments.common.report import command_block, fill_document
from benchmarks.experiments.common.rows import (
    Asked,
    blind_accuracy,
    conversation_rows,
    majority_accuracy,
    read_train,
)
from benchmarks.experiments.common.steps import Step, marker, run_steps, same_recipe, write_json
from benchmarks.experiments.modality import report
from benchmarks.experiments.modality.recipe import SEEDS, Recipe, TunedRun, tuned_command
from benchmarks.experiments.modality.tasks import KINDS, held_out_scenes, text_questions, text_rows
from benchmarks.experiments.nlvr.table import training_step
from benchmarks.experiments.nlvr_methods.recipe import BASE_SEED
from benchmarks.experiments.nlvr_methods.table import BASE, chosen_questions, prepare_base, questions_of, score_step
from llava.runtime.output import replace_text

DOCUMENT = Path(__file__).with_name("README.md")
"""Where the tables go."""
DOCUMENTED_PATHS = Path("data/nlvr"), Path("checkpoints/modality")
PRELOAD = (
    "llava.train.train",
    "llava.train.llava_trainer",
    "llava.eval.answering.runner",
    "llava.eval.answering.options",
    "mma",
)


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.json, val.jsonl and images/")
    parser.add_argument("--output-dir", type=Path, required=True, help="everything that is made goes here")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--pilots", action="store_true", help="only the runs that settle the learning rates")
    parser.add_argument("--rehearsal", type=int, default=None, help="rows in every run, to try the whole way quickly")
    parser.add_argument("--write", action="store_true", help="run nothing, write what is done into README.md")
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe, shortened for a rehearsal."""
    recipe = Recipe()
    if args.rehearsal is None:
        return recipe
    base = replace(recipe.base, rows=args.rehearsal)
    return replace(recipe, base=base, rows=args.rehearsal, every=100, held_out=8)


def prepare(recipe: Recipe, data: Path, folder: Path) -> None:
    """Write rows, questions and, unless a base is there, what it is made from; note the recipe.

    Raises:
        FlagError: the folder was prepared with another recipe.
    """
    if same_recipe(folder, recipe.prepared):
        return
    asked, held_out = read_train(data / "train.json"), held_out_scenes(recipe.held_out)
    if not marker(folder, f"train-{BASE}").exists():
        prepare_base(recipe.as_base, asked, folder)
    for seed in SEEDS:
        text = text_rows(recipe.rows, recipe.turns, seed, held_out)
        write_json(folder / f"train-{seed}.json", image_rows(asked, recipe, seed) + text)
    chosen = chosen_questions(data, recipe.every)
    lines = [line for task in KINDS for line in chosen[task]]
    lines += [json.dumps(question) for question in text_questions(held_out)]
    replace_text(questions_of(folder, None), "\n".join(lines) + "\n", check=False)
    write_json(folder / "recipe.json", recipe.prepared)


def image_rows(asked: Sequence[Asked], recipe: Recipe, seed: int) -> list[dict[str, Any]]:
    """LLaVA rows of one image, with questions of all kinds that its scene has."""
    wanted = [one for one in asked if one.task in KINDS]
    rows = conversation_rows(wanted, recipe.turns, recipe.rows, seed)
    return [row | {"id": f"image-{row['id']}"} for row in rows]


def base_step(recipe: Recipe, data: Path, folder: Path) -> Step:
    """Training of the base."""
    return training_step(recipe.as_base.as_larger, "base", BASE_SEED, data, folder)


def train_step(run: TunedRun, recipe: Recipe, data: Path, folder: Path) -> Step:
    """Training of one run."""
    command = tuned_command(recipe, run, folder / BASE, folder / f"train-{run.seed}.json", data, folder / run.name)
    return Step(f"train-{run.name}", (command,), (f"train-{BASE}",))


def routing_step(run: TunedRun, folder: Path) -> Step:
    """What the routers of a run have learnt."""
    flags = ("--model-path", str(folder / run.name), "--model-base", str(folder / BASE))
    output = ("--output", str(folder / f"routing-{run.name}.json"))
    command = ("-m", "benchmarks.experiments.modality.routing", *flags, *output)
    return Step(f"routing-{run.name}", (command,), (f"train-{run.name}",))


def is_routed(recipe: Recipe, run: TunedRun) -> bool:
    """Whether the run has routers that route."""
    return run.method.temperature == recipe.temperature


def table_runs(recipe: Recipe) -> list[TunedRun]:
    """The runs of the table, seed by seed."""
    return [TunedRun(method, seed, recipe.rates[method.name]) for seed in SEEDS for method in recipe.methods]


def all_steps(recipe: Recipe, data: Path, folder: Path) -> list[Step]:
    """Every step of the table; the base first, then seed by seed."""
    steps = [base_step(recipe, data, folder), score_step(BASE, None, None, data, folder)]
    for run in table_runs(recipe):
        steps += [train_step(run, recipe, data, folder), score_step(run.name, None, folder / BASE, data, folder)]
        if is_routed(recipe, run):
            steps.append(routing_step(run, folder))
    return steps


def pilot_runs(recipe: Recipe) -> list[TunedRun]:
    """Every method at every candidate rate."""
    return [TunedRun(method, SEEDS[0], rate) for rate in recipe.candidates for method in recipe.methods]


def run_pilots(recipe: Recipe, data: Path, folder: Path, workers: int) -> None:
    """Train the pilots, and print the training loss at the end of each."""
    runs = pilot_runs(recipe)
    steps = [base_step(recipe, data, folder), *(train_step(run, recipe, data, folder) for run in runs)]
    run_steps(steps, folder, workers, PRELOAD)
    for run in runs:
        print(f"{run.method.title}, rate {run.rate:g}: loss {report.last_loss(folder / run.name):.3f}")


def asked_questions(folder: Path) -> list[Asked]:
    """The questions of the test, without the lists."""
    rows = map(json.loads, questions_of(folder, None).read_text(encoding="utf-8").splitlines())
    return [Asked(row.get("image", ""), row["category"], row["text"].rpartition("\n")[2], row["label"]) for row in rows]


def trained_about_lists(folder: Path, asked: Sequence[Asked]) -> list[Asked]:
    """Those of the questions `asked` that the first seed is trained on, with every answer they have there."""
    task_of = {one.question: one.task for one in asked}
    rows = json.loads((folder / f"train-{SEEDS[0]}.json").read_text(encoding="utf-8"))
    found = []
    for row in rows:
        for human, gpt in zip(row["conversations"][::2], row["conversations"][1::2], strict=True):
            question = human["value"].rpartition("\n")[2]
            if "image" not in row and question in task_of:
                found.append(Asked("", task_of[question], question, gpt["value"]))
    return found


def documented_commands(recipe: Recipe) -> list[tuple[str, ...]]:
    """The commands that README.md shows: the runs of the first seed, with the paths of the documented call."""
    runs = [run for run in table_runs(recipe) if run.seed == SEEDS[0]]
    names = [f"{kind}-{run.name}" for run in runs for kind in ("train", "routing")]
    steps = all_steps(recipe, *DOCUMENTED_PATHS)
    return [command for step in steps if step.name in names for command in step.commands]


def write_document(document: Path, recipe: Recipe, data: Path, folder: Path) -> None:
    """Fill tables of what is done, and commands, into README.md.

    Raises:
        DocumentError: it lacks the marked places.
    """
    asked = asked_questions(folder)
    images, lists = [one for one in asked if one.image], [one for one in asked if not one.image]
    blind = blind_accuracy(read_train(data / "train.json"), images)
    blind |= blind_accuracy(trained_about_lists(folder, lists), lists)
    references = {
        "majority answer": report.columns(majority_accuracy(asked)),
        "blind (question only)": report.columns(blind),
        "base": report.read_scores(folder, BASE),
    }
    runs = table_runs(recipe)
    done = [run for run in runs if marker(folder, f"score-{run.name}").exists()]
    results = [report.read_result(recipe, run, folder) for run in done]
    routings = {
        run.seed: json.loads((folder / f"routing-{run.name}.json").read_text(encoding="utf-8"))
        for run in done
        if is_routed(recipe, run) and marker(folder, f"routing-{run.name}").exists()
    }
    contents = {
        "modality table": report.summary_table(recipe.methods, references, results),
        "modality routing": report.routing_lines(routings),
        "modality seeds": report.seed_table(recipe.methods, results),
        "modality commands": command_block(documented_commands(recipe)),
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
    if args.pilots:
        run_pilots(recipe, args.data, args.output_dir, args.workers)
        return
    steps = all_steps(recipe, args.data, args.output_dir)
    if not args.write:
        run_steps(steps, args.output_dir, args.workers, PRELOAD)
    if args.rehearsal is None:
        write_document(DOCUMENT, recipe, args.data, args.output_dir)
        print(f"written to {DOCUMENT}")


if __name__ == "__main__":
    main()
