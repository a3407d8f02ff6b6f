r"""Build the playground: images, questions, tokenizer and a small trained LLaVA, all from one seed.

python -m playground.generate --output playground/data --seed 0

What is finished is kept: the same command again continues an interrupted build, and rebuilds everything if the recipe
or the code that makes it has changed. Only files that this program makes are ever replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from llava.errors import FlagError
from llava.runtime.output import claim, discard, is_ours, put_in_place
from llava.runtime.recognize import foreign_message, is_plain_file
from playground.questions import (
    BASE_QUESTIONS,
    BASE_TRAIN,
    CAPTIONS,
    IMAGES,
    NEW_QUESTIONS,
    NEW_TRAIN,
    SCENES,
    DataWriter,
)
from playground.recipe import RECIPE_FILE, Recipe, minimal_recipe, write_atomically
from playground.stages import (
    PROJECTOR_FILE,
    TOWER_LOG,
    TRAINED_LANGUAGE_MODEL,
    TRAINED_TOWER,
    train_full,
    train_projector,
    train_tower,
)
from playground.tiny import build_tiny

DEFAULT_OUTPUT = Path("playground/data")
DEFAULT_THREADS = 1
"""Not the number of cores: the order of summation, and so the last digits, depend on it. Images are read by another
process meanwhile, so that two cores are busy."""

DATA = "tiny"
CHECKPOINTS = "checkpoints"
UNTRAINED = "tiny-untrained"
PRETRAINED = "tiny-llava-pretrain"
BASE = "tiny-llava"
LOG_FILE = "build.log"

console = Console()


@dataclass(frozen=True)
class Playground:
    """Where everything of a playground lies.

    Attributes:
        folder: what `--output` names.
        recipe: what it is made from.
        seconds: time that each step took when it was built, by name.
    """

    folder: Path
    recipe: Recipe
    seconds: dict[str, float]

    @property
    def data(self) -> Path:
        """Folder of the data files."""
        return self.folder / DATA

    @property
    def checkpoints(self) -> Path:
        """Folder of the models."""
        return self.folder / CHECKPOINTS

    @property
    def images(self) -> Path:
        """Folder that image names are relative to."""
        return self.data / IMAGES

    @property
    def base(self) -> Path:
        """The trained base: a complete LLaVA checkpoint."""
        return self.checkpoints / BASE

    @property
    def projector(self) -> Path:
        """The base's projector in a file of its own."""
        return self.base / PROJECTOR_FILE


@dataclass(frozen=True)
class Step:
    """One part of the build: it fills an empty folder, whose entries are then moved to `target`.

    Attributes:
        name: key in the recipe file.
        description: for the progress line.
        target: where the entries go.
        products: names of the entries.
        make: fills the folder it is given.
    """

    name: str
    description: str
    target: Path
    products: tuple[str, ...]
    make: Callable[[Path], None]


def build_steps(place: Playground) -> list[Step]:
    """The steps of a build, in order."""
    recipe, data, checkpoints = place.recipe, place.data, place.checkpoints
    files = (IMAGES, SCENES, CAPTIONS, BASE_TRAIN, NEW_TRAIN, BASE_QUESTIONS, NEW_QUESTIONS)
    return [
        Step("data", "images and questions", data, files, lambda folder: DataWriter(folder, recipe).write()),
        Step(
            "untrained",
            "tokenizer and random weights",
            checkpoints,
            (UNTRAINED,),
            lambda folder: build_tiny(folder / UNTRAINED, recipe.seed, recipe.sizes),
        ),
        Step(
            "tower",
            "training stage 1 of 3: tower, projector and language model, on captions",
            checkpoints,
            (TRAINED_TOWER, TRAINED_LANGUAGE_MODEL, TOWER_LOG),
            lambda folder: train_tower(data, checkpoints / UNTRAINED, folder, recipe),
        ),
        Step(
            "projector",
            "training stage 2 of 3: a new projector, on captions",
            checkpoints,
            (PRETRAINED,),
            lambda folder: train_projector(data, checkpoints, folder / PRETRAINED, recipe),
        ),
        Step(
            "full",
            "training stage 3 of 3: language model and projector, on questions",
            checkpoints,
            (BASE,),
            lambda folder: train_full(data, checkpoints, checkpoints / PRETRAINED, folder / BASE, recipe),
        ),
    ]


def build(folder: Path, recipe: Recipe, *, fresh: bool = False, threads: int = DEFAULT_THREADS) -> Playground:
    """Build what is missing of a playground.

    Args:
        folder: where it goes; other files there are left alone.
        recipe: what to make.
        fresh: build everything anew, also what is finished.
        threads: of torch; part of what makes a build repeatable to the last digit.

    Raises:
        FlagError: a product's name is taken in `folder` by something that no build made.
    """
    torch.set_num_threads(threads)
    disable_progress_bar()  # of loading weights; those of training stay
    record_path = folder / RECIPE_FILE
    record = {"fingerprint": recipe.fingerprint(), "threads": threads, "recipe": recipe.to_dict(), "seconds": {}}
    known = _known_record(record_path)
    if known is not None and not fresh:
        if (known["fingerprint"], known["threads"]) == (record["fingerprint"], threads):
            record["seconds"] = known["seconds"]
        else:
            console.print(f"{folder}: made by another recipe ({known['fingerprint']}); building anew")
    place = Playground(folder, recipe, record["seconds"])
    steps = build_steps(place)
    # Records of earlier versions do not say what was made: whatever has the name of a product.
    everything = [] if known is None else sorted(name for step in steps for name in step.products)
    record["made"] = everything if known is None else known.get("made", everything)
    _refuse_foreign(steps, record["made"])
    rebuilding = False
    for number, step in enumerate(steps, start=1):
        head = f"[{number}/{len(steps)}] {step.description}"
        if not rebuilding and step.name in place.seconds:
            console.print(f"{head}: finished before ({place.seconds[step.name]:.0f} s), reused")
            continue
        rebuilding = True  # later steps are made from this one
        console.print(f"{head} ...", highlight=False)
        for later in steps[number - 1 :]:
            place.seconds.pop(later.name, None)
        folder.mkdir(parents=True, exist_ok=True)
        record["made"] = sorted({*record["made"], *step.products})
        write_atomically(record_path, json.dumps(record, indent=2) + "\n")
        place.seconds[step.name] = _run(step, folder / LOG_FILE)
        write_atomically(record_path, json.dumps(record, indent=2) + "\n")
    return place


def _known_record(path: Path) -> dict[str, Any] | None:
    """The record of an earlier build; None if there is none.

    Raises:
        FlagError: a file of its name is something else; it is left as it is.
    """
    if not os.path.lexists(path):
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if is_plain_file(path) else None
    except ValueError:
        known = None
    if not isinstance(known, dict) or not {"fingerprint", "threads", "seconds"} <= known.keys():
        raise FlagError(foreign_message(path))
    return known


def _refuse_foreign(steps: Sequence[Step], made: Collection[str]) -> None:
    """Refuse products' names that are taken by what no build made, and names that are needed to make them."""
    for step in steps:
        partial = _partial(step)
        if os.path.lexists(partial) and not is_ours(partial):
            raise FlagError(f"{partial} exists, but no build made it; name another --output, or move it away")
        for name in step.products:
            if os.path.lexists(step.target / name) and name not in made:
                raise FlagError(
                    f"{step.target / name} exists, but no {RECIPE_FILE} says that this program made it; name another "
                    "--output, or move it away"
                )


def _partial(step: Step) -> Path:
    """The hidden folder in which a step works; it contains a marker."""
    return step.target / f".partial-{step.name}"


def _run(step: Step, log_file: Path) -> float:
    """Make the products of a step in a hidden folder and move them to their place; returns the seconds.

    What the step prints goes into the log; progress bars, which use the error stream, stay visible.
    """
    started = time.monotonic()
    discard(_partial(step))
    partial = claim(_partial(step)) / "new"
    partial.mkdir()
    with log_file.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        step.make(partial)
    for name in step.products:
        target = step.target / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)  # `_refuse_foreign` knows that a build made it
        put_in_place(partial / name, target)
    partial.rmdir()  # fails if a step made more than it declares
    discard(partial.parent)
    return round(time.monotonic() - started, 1)


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m playground.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_build_options(parser)
    return parser


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """The options that this program and the demo share."""
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="folder for data and models (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything; the same seed gives the same files")
    parser.add_argument("--fresh", action="store_true", help="build everything anew, also what is finished")
    parser.add_argument(
        "--minimal",
        action="store_true",
        help="the smallest build that runs, in seconds: to try the machinery; the model will know nothing",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=DEFAULT_THREADS,
        help="threads of torch (default: %(default)s); results are repeatable for one number of threads",
    )


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the options ask for."""
    return minimal_recipe(args.seed) if args.minimal else Recipe(seed=args.seed)


def main(argv: Sequence[str] | None = None) -> Playground:
    """Run the program: build, then say what there is.

    Raises:
        FlagError: see `build`.
    """
    args = build_parser().parse_args(argv)
    place = build(args.output, chosen_recipe(args), fresh=args.fresh, threads=args.threads)
    console.print(f"\nplayground ready after {sum(place.seconds.values()):.0f} s of building:")
    console.print(f"  data        {place.data}\n  base model  {place.base}\n")
    console.print("Next: python -m playground.demo, or ask the base some questions:")
    print(
        f"python -m llava.eval.model_vqa_loader --model-path {place.base} --image-folder {place.images} "
        f"--question-file {place.data / BASE_QUESTIONS} --answers-file playground/out/base_answers.jsonl "
        "--temperature 0 --conv-mode v1 --batch-size 32"
    )
    return place


if __name__ == "__main__":
    main()
