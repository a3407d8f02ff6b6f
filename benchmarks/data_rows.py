"""Starting on a large list of training data: the index of places against parsing the whole list in every process.

    python -m benchmarks.data_rows --output benchmarks/results/data-rows-cpu.json

A list of generated conversations is opened in processes of their own: by `json.load`, as upstream does, by our reader
for the first time, and again when its table is kept. Each then reads every tenth row in a forked data worker.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import check_run, provenance, show_and_write
from llava.data.rows import open_rows
from llava.errors import FlagError
from llava.runtime.program import run_program

PROGRAM = "benchmarks.data_rows"
WORDS = [
    f"{first}{second}" for first in ("ba", "co", "di", "fu", "ge", "ho") for second in ("ra", "st", "lme", "n", "k")
]
TURNS, ANSWER_WORDS = (2, 4, 6, 8, 10), 40
EVERY = 10
"""A worker reads one row of so many."""


def rows(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Conversations of the mixture's usual shape: several turns, an image in most."""
    draw = random.Random(seed)
    for number in range(count):
        turns = []
        for turn in range(draw.choice(TURNS)):
            words = " ".join(draw.choices(WORDS, k=draw.randrange(5, 2 * ANSWER_WORDS if turn % 2 else 20)))
            turns.append({"from": "gpt" if turn % 2 else "human", "value": words})
        image = {"image": f"coco/train2017/{number:012}.jpg"} if draw.random() < 0.94 else {}
        yield {"id": f"{number:012}", **image, "conversations": turns}


def write_list(path: Path, count: int) -> int:
    """Write the list and return its bytes."""
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, row in enumerate(rows(count)):
            file.write((", " if number else "") + json.dumps(row))
        file.write("]")
    return path.stat().st_size


def memory(name: str) -> int:
    """Bytes of this process: `Rss`, or `Private_Dirty`, what it shares with nobody.

    Raises:
        FlagError: the system does not say.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise FlagError(f"memory is read from /proc/self/smaps_rollup, which is not here ({error.strerror})") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def whole(path: Path) -> Sequence[Any]:
    """As upstream opens a list."""
    with path.open(encoding="utf-8") as file:
        return json.load(file)


def indexed(path: Path) -> Sequence[Any]:
    """Our reader."""
    return open_rows(path)


WAYS: dict[str, Callable[[Path], Sequence[Any]]] = {
    "json.load": whole,
    "index, first start": indexed,
    "index, kept": indexed,
}
"""In this order: the second leaves the table that the third uses."""


def _worker(opened: Sequence[Any], pipe: Connection) -> None:
    """Read rows as a data worker does, and report by how much the memory of this process alone has grown."""
    before = memory("Private_Dirty")
    words = sum(len(opened[index]["conversations"]) for index in range(0, len(opened), EVERY))
    pipe.send((memory("Private_Dirty") - before, words))


def _measured(open_list: Callable[[Path], Sequence[Any]], path: Path, pipe: Connection) -> None:
    gc.collect()
    before, wall, computing = memory("Rss"), time.perf_counter(), time.process_time()
    opened = open_list(path)
    seconds, computed = time.perf_counter() - wall, time.process_time() - computing
    grown = memory("Rss") - before
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_worker, args=(opened, sender))
    worker.start()
    worker_grown, turns = receiver.recv()
    worker.join()
    pipe.send(
        {"wall_seconds": seconds, "seconds": computed, "bytes": grown, "worker_bytes": worker_grown, "turns": turns}
    )


def measure(name: str, path: Path) -> dict[str, Any]:
    """Time and memory of one way, in a process of its own."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(WAYS[name], path, sender))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError as error:
        raise FlagError(f"{name}: the process ended without a result; see above") from error
    process.join()
    return {"way": name, **result}


def document(record: Mapping[str, Any]) -> str:
    """The Markdown file of a record."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    settings, first = record["settings"], record["results"][0]
    lines = [
        f"# Starting on a list of {settings['rows']:,} rows: {record['machine']['cpu']}",
        "",
        f"{record['date'][:10]}; {versions}; {settings['bytes'] / 1e6:,.0f} MB; computing time of the process.",
        "",
        "```console",
        f"$ {record['command']}",
        "```",
        "",
        "| way | seconds | times json.load | MB a process | times json.load | MB a worker grows by |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for result in record["results"]:
        time_ratio, memory_ratio = (result[key] / first[key] for key in ("seconds", "bytes"))
        numbers = (f"{result['seconds']:.2f}", f"{time_ratio:.3f}", f"{result['bytes'] / 1e6:,.0f}")
        cells = (*numbers, f"{memory_ratio:.4f}", f"{result['worker_bytes'] / 1e6:,.1f}")
        lines.append(f"| {result['way']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=665_000, help="rows of the list, at least 20,000: so that it is kept"
    )
    parser.add_argument("--output", type=Path, help="write the record here (.json), and a table with it (.md)")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, show and write.

    Raises:
        FlagError: a flag is out of its range, or the ways read different rows.
    """
    args = build_parser().parse_args(argv)
    check_run("cpu", args.output)
    if args.rows < 20_000:
        raise FlagError(f"--rows {args.rows}: must be at least 20,000")
    record = provenance(PROGRAM, sys.argv[1:] if argv is None else argv, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # nothing is left on this machine
        path = Path(folder) / "list.json"
        record["settings"] = {"rows": args.rows, "bytes": write_list(path, args.rows)}
        record["results"] = [measure(name, path) for name in WAYS]
    if len({result["turns"] for result in record["results"]}) != 1:
        raise FlagError(f"the ways read different rows: {record['results']}")
    show_and_write(record, document(record), args.output)
    return record


if __name__ == "__main__":
    run_program(main)
