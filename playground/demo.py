r"""The main job from end to end on a CPU: build a small LLaVA, fine-tune it with HydraLoRA, show that it has learnt.

python -m playground.demo

Builds the playground (a finished one is reused), measures the base on task families that it has never seen, fine-tunes
it by `scripts/MLLM_HydraLoRA.sh`, measures again. Then trains predictors on the base that drop image tokens, compares
the sparse model with the base, and writes a report page. Ends with an error if accuracy on the new families rises by
less than 25 points, or if that on the base families falls by more than 15 through sparsity.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from safetensors import safe_open

from llava.errors import LlavaError
from playground.evaluate import Result, evaluate, expert_shares
from playground.generate import Playground, add_build_options, build, chosen_recipe
from playground.outputs import check_removable, remove_earlier_run
from playground.questions import BASE_QUESTIONS, NEW_QUESTIONS, NEW_TRAIN
from playground.recipe import Stage, write_atomically
from playground.report import DemoRun, Measurement, write_report
from playground.sparse import compare, train_sparse
from playground.stages import TRAINED_TOWER, stage_flags
from playground.summary import print_results

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "scripts/MLLM_HydraLoRA.sh"
DEFAULT_RESULTS = Path("playground/out")
TUNED = "tiny-llava-lora-mohle"
SPARSE = "tiny-llava-sparse"

REQUIRED_RISE = 25.0
"""Points of accuracy on the new families below which the demo fails."""

ALLOWED_LOSS = 15.0
"""Points of accuracy on the base families that dropping image tokens may cost."""

RANK = 16
ALPHA = 32
ROUTING_QUESTIONS = 12

console = Console(highlight=False)


class DemoError(LlavaError, RuntimeError):
    """The demo ran but did not show what it is there to show."""


def fine_tune(place: Playground, output: Path, stage: Stage, threads: int) -> None:
    """Run `scripts/MLLM_HydraLoRA.sh` on the new families; flags of size and length are added to the script's own.

    Raises:
        DemoError: the script failed; its log is named.
        FlagError: `output` contains something that no run wrote.
    """
    remove_earlier_run(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        "MODEL": place.base.resolve(),
        "VISION_TOWER": (place.checkpoints / TRAINED_TOWER).resolve(),
        "PROJECTOR": place.projector.resolve(),
        "DATA": (place.data / NEW_TRAIN).resolve(),
        "IMAGES": place.images.resolve(),
        "OUTPUT": output.resolve(),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
    }
    flags = ["--lora_rank", str(RANK), "--lora_alpha", str(ALPHA), "--mm_projector_lr", str(stage.learning_rate)]
    command = ["bash", SCRIPT, *flags, *stage_flags(stage, place.recipe.seed)]
    log = output.parent / f"{output.name}.log"
    with log.open("w", encoding="utf-8") as file:
        # The progress bar goes to the terminal, everything else into the log.
        finished = subprocess.run(
            command, cwd=ROOT, env=os.environ | {k: str(v) for k, v in environment.items()}, stdout=file, check=False
        )
    if finished.returncode != 0:
        raise DemoError(f"{SCRIPT} ended with status {finished.returncode}; see above and {log}")


def trained_parameters(checkpoint: Path) -> dict[str, int]:
    """Number of parameters in each file of weights of a checkpoint, by its path in the folder."""
    counts = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
        counts[path.relative_to(checkpoint).as_posix()] = sum(_product(size) for size in sizes)
    return counts


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def measure(place: Playground, model: Path, model_base: Path | None, answers: Path) -> tuple[Result, Result]:
    """Scores of a model on the new and on the base families; its answers go into the folder `answers`."""
    answers.mkdir(parents=True, exist_ok=True)
    new, base = (
        evaluate(model, model_base, place.data / file, place.images, answers / file)
        for file in (NEW_QUESTIONS, BASE_QUESTIONS)
    )
    return new, base


def run(place: Playground, results: Path, threads: int) -> DemoRun:
    """Measure, fine-tune, measure, look at the routing."""
    # Times of building come from its own log: what was built by an earlier demo is not built again.
    tuned = results / "checkpoints" / TUNED
    seconds = {f"build: {name}": value for name, value in place.seconds.items()}

    def timed(name: str, started: float) -> None:
        seconds[name] = round(time.monotonic() - started, 1)

    console.rule("The base before fine-tuning")
    started = time.monotonic()
    # The base first, on the same questions: the rise is the result, not the accuracy.
    before = measure(place, place.base, None, results / "answers-before")
    timed("evaluation before", started)
    console.rule(f"Fine-tuning with {SCRIPT}")
    started = time.monotonic()
    fine_tune(place, tuned, place.recipe.tune, threads)
    timed("fine-tuning", started)
    console.rule("The same questions after fine-tuning")
    started = time.monotonic()
    after = measure(place, tuned, place.base, results / "answers-after")
    timed("evaluation after", started)
    # On questions of the new families, which the experts were trained for.
    shares = expert_shares(tuned, place.base, after[0].questions, place.images, ROUTING_QUESTIONS)
    console.rule("The base with predictors that drop image tokens")
    sparse = results / "checkpoints" / SPARSE
    started = time.monotonic()
    # On the base, not on the tuned model: dense and sparse then differ by the predictors alone.
    train_sparse(place, sparse, place.recipe.sparse)
    timed("training of the sparse model", started)
    started = time.monotonic()
    answers = results / "answers-sparse"
    answers.mkdir(parents=True, exist_ok=True)
    answered = evaluate(sparse, None, place.data / BASE_QUESTIONS, place.images, answers / BASE_QUESTIONS)
    compared = compare(place, sparse, before[1], answered)
    timed("evaluation of the sparse model", started)
    return DemoRun(
        place=place,
        tuned=tuned,
        new=Measurement(before[0], after[0]),
        base=Measurement(before[1], after[1]),
        trained=trained_parameters(tuned),
        base_parameters=trained_parameters(place.base)["model.safetensors"],
        expert_shares=shares,
        sparse=compared,
        seconds=seconds,
    )


def check_rise(run: DemoRun) -> None:
    """Fail if a model has not learnt.

    Raises:
        DemoError: accuracy on the new families rose by less than `REQUIRED_RISE` points, or the sparse model's on the
            base families is more than `ALLOWED_LOSS` points below the base's.
    """
    if run.sparse.loss > ALLOWED_LOSS:
        raise DemoError(
            f"dropping image tokens costs {run.sparse.loss:.1f} points of accuracy on the base families, more than "
            f"{ALLOWED_LOSS:.0f}: look at the losses in {run.sparse.tuned / 'trainer_state.json'}"
        )
    if run.new.rise < REQUIRED_RISE:
        raise DemoError(
            f"accuracy on the new task families rose by {run.new.rise:.1f} points, less than {REQUIRED_RISE:.0f}: "
            "fine-tuning has not learnt what it should; the report shows the losses"
        )


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m playground.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_build_options(parser)
    parser.add_argument(
        "--results", type=Path, default=DEFAULT_RESULTS, help="folder for answers, checkpoint and report"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> DemoRun:
    """Run the program.

    Raises:
        DemoError: training failed, or the model has not learnt (not checked with `--minimal`).
        FlagError: the name of a checkpoint is taken by something that no demo has trained.
    """
    args = build_parser().parse_args(argv)
    started = time.monotonic()
    for name in (TUNED, SPARSE):  # before the work, not in the middle of it
        check_removable(args.results / "checkpoints" / name)
    place = build(args.output, chosen_recipe(args), fresh=args.fresh, threads=args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    demo = run(place, args.results, args.threads)
    report = write_report(args.results / "report.html", demo)
    record = {
        "seed": args.seed,
        "new": {family: [asdict(score) for score in pair] for family, pair in demo.new.by_family().items()},
        "base": {family: [asdict(score) for score in pair] for family, pair in demo.base.by_family().items()},
        "trained_parameters": demo.trained,
        "expert_shares": demo.expert_shares,
        "sparse": {
            "dense": {family: asdict(score) for family, score in demo.sparse.dense_result.scores.items()},
            "sparse": {family: asdict(score) for family, score in demo.sparse.sparse_result.scores.items()},
            "dense_cost": asdict(demo.sparse.dense_cost),
            "sparse_cost": asdict(demo.sparse.sparse_cost),
            "prefill_speedup": demo.sparse.speedup,
            "things_kept": demo.sparse.things_kept,
            "patches_kept": demo.sparse.patches_kept,
        },
        "seconds": demo.seconds,
    }
    write_atomically(args.results / "demo.json", json.dumps(record, indent=2) + "\n")
    print_results(console, demo, report, SCRIPT)
    console.print(f"\nthe whole demo took {time.monotonic() - started:.0f} s")
    if args.minimal:
        console.print("minimal build: whether the model has learnt is not checked")
    else:
        check_rise(demo)
    return demo


if __name__ == "__main__":
    try:
        main()
    except LlavaError as error:
        sys.exit(f"error: {error}")
