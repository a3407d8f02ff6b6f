"""Accuracy against keep rate: learned predictor, chance and attention scores; fills the README here.

    python -m benchmarks.experiments.sparse.table --data data/nlvr --output-dir checkpoints/sparse

Run from the root of the repository. The same command again continues after an interruption; what is done stays.
`--only-setting late --only-seed 0` stops after one model with one seed. `--rehearsal N` shortens every training to N
updates; neither fills README.md. `--write` runs nothing and fills in what is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.experiments.common.report import command_block, fill_document
from benchmarks.experiments.common.rows import conversation_rows, read_train
from benchmarks.experiments.common.steps import Step, marker, run_steps, same_recipe, write_json
from benchmarks.experiments.nlvr.recipe import TEMPLATE
from benchmarks.experiments.nlvr.table import training_step
from benchmarks.experiments.nlvr_methods.recipe import BASE_SEED
from benchmarks.experiments.nlvr_methods.table import BASE, chosen_questions, prepare_base
from benchmarks.experiments.sparse import report
from benchmarks.experiments.sparse.recipe import (
    RULES,
    SEEDS,
    SPARSE_LAYER,
    Place,
    Recipe,
    Setting,
    TrainedModel,
    runs_of,
    sparse_flags,
    training_command,
)
from llava.runtime.output import replace_text

DOCUMENT = Path(__file__).with_name("README.md")
"""Where the tables go."""
FIGURE = DOCUMENT.with_name("accuracy-by-keep-rate.png")
PRELOAD = (
    "llava.train.train",
    "llava.train.llava_trainer",
    "llava.eval.answering.runner",
    "llava.eval.answering.options",
    "dynamic",
)
DOCUMENTED_PATHS = Path("data/nlvr"), Path("checkpoints/sparse")
SHOWN = ("score-late-dense-0-attention-0.2", "train-late-learned-0.2-0")
"""Steps whose first command README.md shows."""
PLAYGROUND = "playground"
LATE_BASE = "late-base"


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="NLVR: folder with train.json, val.jsonl and images/")
    parser.add_argument("--output-dir", type=Path, required=True, help="everything that is made goes here")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--only-setting", choices=[one.name for one in Recipe().settings], help="one of the models")
    parser.add_argument("--only-seed", type=int, choices=SEEDS, help="one of the seeds")
    parser.add_argument(
        "--rehearsal", type=int, default=None, help="updates of every run, to try the whole way quickly"
    )
    parser.add_argument("--write", action="store_true", help="run nothing, write what is done into README.md")
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe, shortened for a rehearsal."""
    recipe, updates = Recipe(), args.rehearsal
    if updates is None:
        return recipe
    rows = updates * recipe.batch
    base = replace(recipe.base, base=replace(recipe.base.base, rows=rows))
    settings = [replace(setting, updates=updates) for setting in recipe.settings]
    return replace(recipe, base=base, late_rows=rows, settings=settings, every=dict.fromkeys(recipe.every, 100))


def prepare(recipe: Recipe, data: Path, folder: Path) -> None:
    """Write rows and questions of NLVR, tokenizer and the untrained model, and note the recipe.

    Raises:
        FlagError: the folder was prepared with another recipe.
    """
    if same_recipe(folder, asdict(recipe)):
        return
    asked = read_train(data / "train.json")
    prepare_base(recipe.base, asked, folder)
    write_json(folder / f"{LATE_BASE}.json", conversation_rows(asked, recipe.turns, recipe.late_rows, "late"))
    for setting in recipe.settings:
        if setting.name == "tiny":
            continue
        for seed in SEEDS:
            rows = conversation_rows(asked, recipe.turns, setting.updates * recipe.batch, f"{seed}/{setting.name}")
            write_json(folder / f"{setting.name}-rows-{seed}.json", rows)
    lines = [line for task, every in recipe.every.items() for line in chosen_questions(data, every)[task]]
    replace_text(folder / "questions.jsonl", "\n".join(lines) + "\n", check=False)
    write_json(folder / "recipe.json", asdict(recipe))


def place_of(setting: Setting, data: Path, folder: Path) -> Place:
    """Where base and images of a setting lie."""
    if setting.name == "tiny":
        checkpoints = folder / PLAYGROUND / "checkpoints"
        flags = ("--mm_vision_select_layer", "-2", "--image_aspect_ratio", "square")
        return Place(checkpoints / "tiny-llava", checkpoints / "tiny-clip", folder / PLAYGROUND / "tiny/images", flags)
    base = folder / (LATE_BASE if setting.read_from else BASE)
    flags = ("--mm_vision_select_layer", "-1", "--image_aspect_ratio", "stretch")
    return Place(base, folder / BASE / "vision_tower", data, flags)


def rows_of(setting: Setting, seed: int, folder: Path) -> Path:
    """Training rows; the tiny base has one file, whose order follows from the seed."""
    if setting.name == "tiny":
        return folder / PLAYGROUND / "tiny/base_train.json"
    return folder / f"{setting.name}-rows-{seed}.json"


def questions_of(setting: Setting, folder: Path) -> Path:
    """Question file."""
    return folder / PLAYGROUND / "tiny/base_questions.jsonl" if setting.name == "tiny" else folder / "questions.jsonl"


def base_steps(recipe: Recipe, settings: Sequence[Setting], data: Path, folder: Path) -> list[Step]:
    """The bases that `settings` start from."""
    names = {setting.name for setting in settings}
    steps = []
    if names & {"nlvr", "late"}:
        steps.append(training_step(recipe.base.as_larger, "base", BASE_SEED, data, folder))
    if "late" in names:
        late = next(setting for setting in recipe.settings if setting.name == "late")
        place = place_of(replace(late, read_from=0), data, folder)
        updates = recipe.late_rows // recipe.batch
        rows, output = folder / f"{LATE_BASE}.json", folder / LATE_BASE
        command = training_command(
            recipe, place, rows, output, seed=BASE_SEED, updates=updates, read_from=late.read_from
        )
        steps.append(Step(f"train-{LATE_BASE}", (command,), (f"train-{BASE}",)))
    if "tiny" in names:
        command = ("-m", "playground.generate", "--output", str(folder / PLAYGROUND))
        steps.append(Step(f"make-{PLAYGROUND}", (command,)))
    return steps


def train_step(recipe: Recipe, run: TrainedModel, data: Path, folder: Path) -> Step:
    """Training of one model."""
    setting = run.setting
    command = training_command(
        recipe,
        place_of(setting, data, folder),
        rows_of(setting, run.seed, folder),
        folder / run.name,
        seed=run.seed,
        updates=setting.updates,
        read_from=setting.read_from,
    )
    if run.way != "dense":
        command = (*command, *sparse_flags(recipe, run))
    needs = {"nlvr": f"train-{BASE}", "late": f"train-{LATE_BASE}", "tiny": f"make-{PLAYGROUND}"}[setting.name]
    return Step(f"train-{run.name}", (command,), (needs,))


def score_step(run: TrainedModel, rule: str, keep_rate: float, data: Path, folder: Path) -> Step:
    """Answers of a trained model under a rule, and their score; a dense model is made sparse if the rate is below 1."""
    name = report.score_name(run, rule, keep_rate)
    questions = ("--question-file", str(questions_of(run.setting, folder)))
    answers = ("--answers-file", str(folder / f"answers-{name}.jsonl"))
    made_sparse = run.way == "dense" and rule != "none"
    sparsity = ("--keep-rate", f"{keep_rate:g}", "--sparse-layer", str(SPARSE_LAYER)) if made_sparse else ()
    answer = (
        *("-m", "benchmarks.experiments.sparse.answer", "--model-path", str(folder / run.name)),
        *("--rule", rule, *sparsity, "--read-from", str(run.setting.read_from), "--seed", str(run.seed)),
        *(*questions, *answers, "--image-folder", str(place_of(run.setting, data, folder).images)),
        *("--conv-mode", TEMPLATE, "--temperature", "0", "--max_new_tokens", "8"),
        *("--batch-size", "128", "--num-workers", "0", "--device", "cpu"),
    )
    score = ("-m", "llava.eval.score", *questions, *answers, "--output", str(folder / f"score-{name}.json"))
    return Step(f"score-{name}", (answer, score), (f"train-{run.name}",))


def measurements_of(run: TrainedModel) -> list[tuple[str, float]]:
    """Rule and keep rate of every measurement of a trained model."""
    if run.way == "dense":
        return [("none", 1.0), *((rule, rate) for rule in RULES for rate in run.setting.rates)]
    return [("random" if run.way == "random" else "none", run.keep_rate)]


def all_steps(
    recipe: Recipe, data: Path, folder: Path, settings: Sequence[Setting], seeds: Iterable[int]
) -> list[Step]:
    """Every step; the bases first, then seed by seed."""
    steps = base_steps(recipe, settings, data, folder)
    for seed in seeds:
        for setting in settings:
            for run in runs_of(setting, seed):
                steps.append(train_step(recipe, run, data, folder))
                steps += [score_step(run, rule, rate, data, folder) for rule, rate in measurements_of(run)]
    return steps


def finished_results(recipe: Recipe, folder: Path) -> list[report.Result]:
    """Results of everything that is scored."""
    return [
        report.read_result(folder, run, rule, rate)
        for setting in recipe.settings
        for seed in SEEDS
        for run in runs_of(setting, seed)
        for rule, rate in measurements_of(run)
        if marker(folder, f"score-{report.score_name(run, rule, rate)}").exists()
    ]


def documented_commands(recipe: Recipe) -> list[tuple[str, ...]]:
    """The commands that README.md shows, with the paths of the documented call."""
    steps = {step.name: step for step in all_steps(recipe, *DOCUMENTED_PATHS, recipe.settings, SEEDS)}
    return [steps[name].commands[0] for name in SHOWN]


def write_document(document: Path, recipe: Recipe, folder: Path) -> None:
    """Fill tables and commands into README.md and draw the figure.

    Raises:
        DocumentError: it lacks the marked places.
    """
    results = finished_results(recipe, folder)
    contents = {
        "sparse table": report.summary_tables(recipe.settings, results),
        "sparse seeds": report.seed_table(recipe.settings, results),
        "sparse commands": command_block(documented_commands(recipe)),
    }
    fill_document(document, contents)
    report.draw(FIGURE, recipe.settings, results)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        LlavaError: data or options are wrong, or a step failed; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    recipe = recipe_of(args)
    prepare(recipe, args.data, args.output_dir)
    settings = [setting for setting in recipe.settings if args.only_setting in (None, setting.name)]
    seeds = [seed for seed in SEEDS if args.only_seed in (None, seed)]
    steps = all_steps(recipe, args.data, args.output_dir, settings, seeds)
    if not args.write:
        run_steps(steps, args.output_dir, args.workers, PRELOAD)
    if args.rehearsal is None and args.only_setting is None and args.only_seed is None:
        write_document(DOCUMENT, recipe, args.output_dir)
        print(f"written to {DOCUMENT} and {FIGURE}")


if __name__ == "__main__":
    main()
