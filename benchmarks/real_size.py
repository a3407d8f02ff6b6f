"""A LLaVA-1.5-7B of random bfloat16 weights on the CPU: loading, an answer, and an update of MLLM-HydraLoRA, by part.

    python -m benchmarks.real_size --output benchmarks/results/real-size-cpu.json

needs 14 GB of disk in the folder for temporary files (or --folder), which are removed at the end, and 21 GB of memory.
Each step runs in a process of its own. The record is written after each; a step that it has already is left out, so a
run that was stopped is continued by the same command. `--layers` and `--hidden` make the model smaller, to try it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import real_size_report, real_size_steps
from benchmarks.llava_models import SEVEN_B, Folders, Shape, write_json
from benchmarks.record import check_run, provenance, show, write_files
from llava.errors import FlagError
from llava.runtime.files import read_json
from llava.runtime.program import run_program

PROGRAM = "benchmarks.real_size"
STEPS = ("weights", "load", "answer", "update", "floor")
"""In this order: the update says how long a row is, which the floor needs."""

WRITTEN = "shape.json"
"""Written last into the folder of the weights: they are complete."""

GIVEN = "record.json"
"""The record so far, for the process of a step."""

INNER, HEAD, TOWER_HEAD = 43 / 16, 128, 64
"""Proportions of LLaMA-7B and CLIP-L: inner width over width, and widths of heads."""


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=SEVEN_B.layers, help="of the language model (default %(default)s)")
    add("--hidden", type=int, default=SEVEN_B.width, help="its width; the other sizes follow (default %(default)s)")
    add("--vocabulary", type=int, default=SEVEN_B.vocabulary, help="words (default %(default)s)")
    add("--image", type=int, default=SEVEN_B.image, help="pixels of a side of the tower's image (default %(default)s)")
    add("--tokens", type=int, default=16, help="tokens of the answer (default %(default)s)")
    add("--words", type=int, default=64, help="words of the answer that is trained on (default %(default)s)")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="what is measured (default: all)")
    add("--folder", type=Path, default=None, help="where the weights are written; default: a temporary folder")
    add("--keep", action="store_true", help="leave the weights in --folder, for the next run")
    add("--output", type=Path, default=None, help="JSON file, written after each step; the table (.md) goes next to it")
    add("--child", choices=STEPS[1:], default=None, help=argparse.SUPPRESS)
    return parser


def shape_of(args: argparse.Namespace) -> Shape:
    """The model, with the proportions of the real one.

    Raises:
        FlagError: a size is too small.
    """
    if args.layers < 1 or args.hidden < 4 * TOWER_HEAD or args.hidden % (4 * TOWER_HEAD):
        raise FlagError(f"--layers {args.layers} --hidden {args.hidden}: expected layers, and a multiple of 256")
    tower = args.hidden // 4
    return replace(
        SEVEN_B, layers=args.layers, width=args.hidden, inner=round(INNER * args.hidden), heads=args.hidden // HEAD,
        vocabulary=args.vocabulary, image=args.image, tower_layers=max(2, 3 * args.layers // 4), tower_width=tower,
        tower_inner=4 * tower, tower_heads=tower // TOWER_HEAD,
    )  # fmt: skip


@contextlib.contextmanager
def weights_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Where the weights are; removed at the end unless they are to be kept."""
    if args.folder is None:
        with tempfile.TemporaryDirectory(prefix="real-size-") as name:
            yield Path(name)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    yield args.folder
    if not args.keep:
        shutil.rmtree(args.folder)


def begin(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """The record so far.

    Raises:
        FlagError: it is of another model or of other settings.
    """
    settings = {"shape": asdict(shape), "tokens": args.tokens, "words": args.words}
    if args.output is None or not args.output.is_file():
        return {"settings": settings, "patches": shape.patches, "steps": {}}
    record: dict[str, Any] = read_json(args.output)
    if record.get("settings") != settings:
        raise FlagError(f"{args.output} is a record of {record.get('settings')}, not of {settings}; name another file")
    return record


def run_child(step: str, folder: Path, args: argparse.Namespace, record: Mapping[str, Any]) -> dict[str, Any]:
    """One step in a process of its own, so that its peak of memory is its own.

    Raises:
        FlagError: it failed; what it printed is above.
    """
    result = folder / f"{step}.json"
    for path in (result, folder / GIVEN):
        path.unlink(missing_ok=True)  # of a run that was stopped
    write_json(folder / GIVEN, dict(record))  # what the step may need of former ones
    command = [sys.executable, "-m", PROGRAM, "--child", step, "--folder", str(folder), "--output", str(result)]
    for name in ("layers", "hidden", "vocabulary", "image", "tokens", "words"):
        command += [f"--{name}", str(getattr(args, name))]
    status = subprocess.run(command, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}).returncode
    if status:
        raise FlagError(f"step '{step}' ended with status {status}; the same command goes back to it")
    found: dict[str, Any] = read_json(result)
    return found


def child(args: argparse.Namespace) -> None:
    """A step, in its own process."""
    folder = args.folder
    given, folders = read_json(folder / GIVEN), Folders(folder / "llava", folder / "tower")
    steps = {
        "load": lambda: real_size_steps.load(folders),
        "answer": lambda: real_size_steps.answer(folders, folder, args.tokens),
        "update": lambda: real_size_steps.update(folders, folder, args.words),
        "floor": lambda: real_size_steps.floor(folders, folder, shape_of(args), given["steps"]),
    }
    write_json(args.output, steps[args.child]())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the steps that the record does not have, and write each as soon as it is there.

    Raises:
        FlagError: an option is wrong, or a step failed.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words)
    check_run("cpu", args.output)
    if args.keep and args.folder is None:
        raise FlagError("--keep: pass --folder, the place of the weights")
    if args.child is not None:
        child(args)
        return {}
    shape = shape_of(args)
    record = begin(args, shape)
    wanted = [step for step in args.steps if step not in record["steps"]]
    if "floor" in wanted and "update" not in (*wanted, *record["steps"]):
        raise FlagError("--steps floor: it is that of the update; measure that too")
    with weights_folder(args) as folder:
        for step in ("weights", *(name for name in STEPS[1:] if name in wanted)) if wanted else ():
            found = provenance(PROGRAM, words, torch.device("cpu"))
            measured = written_weights(folder, shape) if step == "weights" else run_child(step, folder, args, record)
            if step == "weights" and (measured is None or step not in wanted):
                continue  # they are there, or were measured before
            record["steps"][step] = found | {"threads": torch.get_num_threads(), "found": measured}
            show(f"{step}: {json.dumps(measured)}")
            if args.output is not None:
                write_files(record, args.output, real_size_report.document(record))
    show(real_size_report.document(record))
    return record


def written_weights(folder: Path, shape: Shape) -> dict[str, Any] | None:
    """Seconds and bytes of writing the weights; None if they are there.

    Raises:
        FlagError: those that are there have another shape.
    """
    marker = folder / WRITTEN
    if marker.is_file():
        if read_json(marker) != asdict(shape):
            raise FlagError(f"{folder} holds weights of {read_json(marker)}; name another --folder")
        return None
    measured = real_size_steps.weights(folder, shape)
    write_json(marker, asdict(shape))
    return measured


if __name__ == "__main__":
    run_program(main)
