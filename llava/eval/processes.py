"""One benchmark over several processes, on one machine or several: `torchrun --nproc_per_node 8 -m llava.eval ...`.

Every process answers a chunk in a file of its own; the first one waits for the others and puts the chunks together.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from llava.errors import FlagError
from llava.eval.answers import Task, ToRow
from llava.eval.program import answer_and_measure, chosen
from llava.eval.runner import OpenImage
from llava.output import replace_text

PATIENCE = timedelta(days=7)
"""How long the first process waits for the others; if one of them fails, torchrun ends all."""


@dataclass(frozen=True)
class Processes:
    """The processes of a launcher.

    Attributes:
        count: of all nodes.
        rank: of this process.
        local_rank: on its node; the number of its GPU.
    """

    count: int = 1
    rank: int = 0
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Processes:
        """What torchrun says; one process without it."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(count, *(int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))) if count > 1 else cls()

    def answer(self, args: argparse.Namespace, tasks: Sequence[Task], open_image: OpenImage, to_row: ToRow) -> bool:
        """Answer the chunk of this process, then wait; the first process writes `args.answers_file` from all chunks.

        Args:
            args: the options of `llava.eval`.
            tasks: all that are to be answered.
            open_image: opens one image of a task.
            to_row: makes the row of an answer.

        Returns:
            True in the process that goes on.

        Raises:
            FlagError: chunks are asked for as well.
        """
        if args.num_chunks > 1:
            raise FlagError(
                f"--num-chunks {args.num_chunks}: torchrun has {self.count} processes, which share the questions"
            )
        parts = [self._part(args.answers_file, rank) for rank in range(self.count)]
        own = copy.copy(args)
        own.answers_file, own.num_chunks, own.chunk_idx = parts[self.rank], self.count, self.rank
        own.allow_empty_chunk, own.limit = True, None  # the limit holds for `tasks` already
        if own.device is None and torch.cuda.is_available():
            own.device = f"cuda:{self.local_rank}"
        answer_and_measure(own, chosen(tasks, own), open_image, to_row=to_row)
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        try:
            torch.distributed.barrier()
            if self.rank == 0:
                replace_text(args.answers_file, "".join(part.read_text(encoding="utf-8") for part in parts))
            torch.distributed.barrier()
        finally:
            torch.distributed.destroy_process_group()
        return self.rank == 0

    def _part(self, answers: Path, rank: int) -> Path:
        return answers.with_name(f"{answers.stem}.{rank}-of-{self.count}.jsonl")
