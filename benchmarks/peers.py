"""This project next to its peers in one run: training, evaluation, serving and sparse decoding of one random LLaVA.

    python -m benchmarks.peers --output benchmarks/results/peers-cpu.json

writes one model in our format and in that of transformers, sees that both give the same losses and answers, and times
them in turns: transformers' Trainer with PEFT, its `generate` in batches and `transformers serve`, lmms-eval's
`llava_hf`, static caches, FastV. A part that fails the check is not timed. `--sections` runs some of them; the others
stay in the record as they are. `--docs docs/performance.md` writes the table of the record into that page.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import peer_answers, peer_report, peer_server, peer_sparse, peer_training
from benchmarks.floors import Rates, measure_rates
from benchmarks.llava_models import Shape
from benchmarks.measuring import Clock, clock_for
from benchmarks.peer_models import Pair, build_pair
from benchmarks.record import check_run, provenance, show, write_files
from llava.errors import FlagError
from llava.runtime.files import read_json
from llava.runtime.program import run_program

PROGRAM = "benchmarks.peers"
SECTIONS = ("train", "eval", "serve", "sparse")
SMALL = Shape(
    layers=4, width=64, inner=128, heads=2, vocabulary=1000, image=56, tower_layers=2, tower_width=32, tower_inner=64,
    tower_heads=2,
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="what is measured (default: all)")
    add("--small", action="store_true", help="a tiny model, to try the program")
    for name in ("layers", "width", "inner", "heads", "vocabulary"):
        add(f"--{name}", type=int, default=None, help=f"of the language model (default {getattr(Shape(), name)})")
    add("--rounds", type=int, default=3, help="timed rounds (default %(default)s)")
    add("--dropout", type=float, nargs="+", default=[0.0, 0.05], help="of the adapters (default 0 and 0.05)")
    add("--rows", type=int, default=1, help="rows of a training batch (default %(default)s)")
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32], help="questions answered together")
    add("--tokens", type=int, default=16, help="tokens of an answer (default %(default)s)")
    add("--clients", type=int, nargs="+", default=[1, 4, 16], help="clients of the servers (default 1 4 16)")
    add("--requests", type=int, default=1, help="requests of a client (default %(default)s)")
    add("--keep-rate", type=float, default=0.2, help="share of the image that is kept (default %(default)s)")
    add("--sparse-batches", type=int, nargs="+", default=[1, 8], help="rows of sparse prefill and decoding")
    add("--compile", action="store_true", help="compile decoding with the static cache too")
    add("--output", type=Path, default=None, help="JSON file, updated after each part; the table (.md) goes next to it")
    add("--docs", type=Path, default=None, help="page whose table of peers is replaced by that of --output")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options with the shape filled in.

    Raises:
        FlagError: the output is not a .json file, or a page is to be written without a record.
    """
    args = build_parser().parse_args(argv)
    check_run("cpu", args.output)
    if args.docs is not None and args.output is None:
        raise FlagError(f"--docs {args.docs}: pass --output, the record whose table is written there")
    usual = SMALL if args.small else Shape()
    given = {each.name: getattr(args, each.name, None) for each in fields(Shape)}
    args.shape = Shape(**{**asdict(usual), **{name: value for name, value in given.items() if value is not None}})
    return args


def measured_parts(
    args: argparse.Namespace, pair: Pair, folder: Path, clock: Clock, rates: Rates
) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """What is measured: section, name of the part within it, and what measures it."""
    parts: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for dropout in args.dropout if "train" in args.sections else ():
        train = partial(peer_training.measure, pair, folder / "training", dropout, args.rows, clock, args.rounds, rates)
        parts.append(("train", f"dropout {dropout:g}", train))
    for size in args.batch_sizes if "eval" in args.sections else ():
        answer = partial(peer_answers.measure, pair, folder, args.tokens, size, clock, args.rounds, rates)
        parts.append(("eval", f"batch {size}", answer))
    wall = Clock("wall", time.perf_counter)
    for clients in args.clients if "serve" in args.sections else ():
        serve = partial(peer_server.measure, pair, folder, args.tokens, clients, args.requests, wall, args.rounds)
        parts.append(("serve", f"{clients} clients", serve))
    sizes = (args.tokens, args.compile, clock, args.rounds, rates)
    for batch in args.sparse_batches if "sparse" in args.sections else ():
        sparse = partial(peer_sparse.measure, args.shape, args.keep_rate, batch, *sizes)
        parts.append(("sparse", f"batch {batch}", sparse))
    return parts


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """The record so far, if it is of the same model.

    Raises:
        FlagError: the record is of another model.
    """
    shape = asdict(args.shape)
    if args.output is None or not args.output.is_file():
        return {"shape": shape, "patches": args.shape.patches, "parts": {}}
    record: dict[str, Any] = read_json(args.output)
    if record.get("shape") != shape:
        raise FlagError(
            f"{args.output} is a record of the model {record.get('shape')}, not of {shape}; name another file"
        )
    return record


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, and write each part as soon as it is there.

    Raises:
        FlagError: an option cannot be carried out, or two formats do not give the same losses or answers.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(words)
    record = begin(args)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clock = clock_for(torch.device("cpu"), 1)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            images = max(
                [1, args.rows, peer_answers.LEAST, *args.batch_sizes, *(n * args.requests for n in args.clients)]
            )
            pair = build_pair(folder, args.shape, images) if args.sections else None
            rates = measure_rates(args.shape.patches + 64, args.shape.width, args.shape.inner, torch.float32)
            for section, part, measure in measured_parts(args, pair, folder, clock, rates) if pair else ():
                found = provenance(PROGRAM, words, torch.device("cpu"))  # of this part: its moment and its load
                found |= {"clock": "wall" if section == "serve" else clock.name, "rounds": args.rounds}
                found |= {"rates": rates.record(), "found": measure()}
                record["parts"].setdefault(section, {})[part] = found
                show(f"{section}, {part}: {json.dumps(found['found'])}")
                if args.output is not None:
                    write_files(record, args.output, peer_report.document(record))
    finally:
        torch.set_num_threads(threads)
    show(peer_report.document(record))
    if args.docs is not None:
        peer_report.write_page(args.docs, record)
        show(f"Written: {args.docs}")
    return record


if __name__ == "__main__":
    run_program(main)
