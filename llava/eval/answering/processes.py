"""Several processes, on one machine or more, that share the questions of a benchmark (`torchrun --nproc_per_node 8`).

Each answers a part into a file of its own; when all have finished, the first puts the parts together. They exchange
nothing but the signals that they have arrived, and whether any of them has something left to ask.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from llava.errors import FlagError
from llava.eval.answering.answers import Task, ToRow, refuse_foreign_answers, settings_path
from llava.eval.answering.question_run import answer_and_measure
from llava.eval.answering.questions import read_jsonl
from llava.eval.answering.recognition import ANSWER_SHAPES
from llava.eval.answering.runner import OpenImage
from llava.runtime.output import replace_text

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=7)
"""One process may be done long before another."""


@dataclass(frozen=True)
class Processes:
    """The processes of this run.

    Attributes:
        rank: number of this one.
        count: how many there are.
        local_rank: number of this one on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this one puts the parts together."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's consecutive share of a list; the shares differ by one item at most."""
        start, end = (len(items) * number // self.count for number in (self.rank, self.rank + 1))
        return items[start:end]

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def any(self, here: bool) -> bool:
        """Whether it is so in one of the processes; all of them must ask."""
        if self.count == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Run a block in the first process, and then in the others."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that a launcher has started, or this one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield Processes(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()


def part_of(path: Path, rank: int, count: int) -> Path:
    """The answers file of one process."""
    return path.with_name(f"{path.stem}.{rank}-of-{count}.jsonl")


def put_together(processes: Processes, path: Path) -> None:
    """When all processes have finished their parts, the first writes `path` and the settings beside it.

    Args:
        processes: more than one.
        path: the answers file; it is there in every process when this returns.

    Raises:
        FlagError: a part is not there, because the processes do not share a folder; or `path` holds something else
            than answers.
    """
    parts = [part_of(path, rank, processes.count) for rank in range(processes.count)]
    processes.wait()
    lacking = [part.name for part in parts if not part.is_file()]
    if lacking:
        raise FlagError(f"{path.parent}: has no {lacking}; several machines need a folder that all of them see")
    if processes.is_first:
        refuse_foreign_answers(path, (*ANSWER_SHAPES, *{tuple(row) for part in parts for _, row in read_jsonl(part)}))
        text = "".join(part.read_text(encoding="utf-8") for part in parts)
        path.unlink(missing_ok=True)  # at no moment answers of one run next to the settings of another
        replace_text(settings_path(path), settings_path(parts[0]).read_text(encoding="utf-8"), check=False)
        replace_text(path, text, check=False)
    processes.wait()


def answer_share(
    processes: Processes, args: argparse.Namespace, tasks: Sequence[Task], open_image: OpenImage, to_row: ToRow
) -> None:
    """Answer this process's part of `tasks`; when all have, the first one writes `args.answers_file`.

    Args:
        processes: more than one.
        args: the options of `llava.eval`; an answers file that this wrote is not restarted again.
        tasks: those of all processes.
        open_image: opens one image of a task.
        to_row: makes the row of an answer.

    Raises:
        FlagError: chunks are asked for as well, or the answers file there was made with other settings.
    """
    if args.num_chunks > 1:
        raise FlagError(
            f"--num-chunks {args.num_chunks}: torchrun has {processes.count} processes, which share the work"
        )
    own = copy.copy(args)
    own.answers_file = part_of(args.answers_file, processes.rank, processes.count)
    if own.device is None and torch.cuda.is_available():
        own.device = f"cuda:{processes.local_rank % torch.cuda.device_count()}"
    answer_and_measure(own, processes.part(tasks), open_image, to_row=to_row, whole=args.answers_file)
    put_together(processes, args.answers_file)
    args.restart = False
