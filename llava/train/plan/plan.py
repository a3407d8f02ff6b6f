"""The plan of a command: what an update takes on one GPU, and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from llava.model.language_model.backbones import load_config
from llava.train.plan.command import Command
from llava.train.plan.shares import Share, share_of
from llava.train.plan.update import Rehearsal, Update

GIB = 2**30

OUTSIDE = GIB
"""Bytes of a GPU that no tensor has: CUDA's context, the libraries' workspaces. Taken off `--gpu_memory`."""

LARGEST = 4096
"""Rows of a micro batch at which the search for the largest one ends."""

CLEAR = 0.8
"""Share of the bytes of a row by which a batch has to be too large for it not to be measured."""


@dataclass(frozen=True)
class Plan:
    """What a command takes.

    Attributes:
        command: what was planned.
        update: of the command's own batch.
        share: of one GPU.
        largest: rows of the largest micro batch that fits; 0 if one row does not.
    """

    command: Command
    update: Update
    share: Share
    largest: int

    @property
    def fits(self) -> bool:
        """Whether the command's own batch fits."""
        return self.share.total + outside(self.command) <= self.command.gpu_memory * GIB

    def to_dict(self) -> dict[str, Any]:
        """Numbers as JSON types; bytes of one GPU."""
        args = self.command.args
        return {
            "device": self.command.device.type,
            "gpus": self.command.gpus,
            "gpu_memory": self.command.gpu_memory,
            "batch": self.command.batch,
            "gradient_accumulation_steps": args.training.gradient_accumulation_steps,
            "length": args.training.model_max_length,
            "bytes": {str(part): number for part, number in self.share.parts.items()},
            "buffers": self.share.buffers,
            "host": self.share.host,
            "total": self.share.total,
            "fits": self.fits,
            "largest_batch": self.largest,
            "trained": self.update.trained,
            "flops": self.update.flops,
            "waits": dict(self.update.waits),
            "step_waits": dict(self.update.step_waits),
        }


def make_plan(command: Command) -> Plan:
    """Measure the command's batch, and search for the largest one."""
    config = load_config(command.args.model.model_name_or_path, command.args.training.cache_dir)
    half_bytes = 2 if command.args.training.bf16 else 4
    share = partial(share_of, gpus=command.gpus, zero=command.zero, width=config.hidden_size, half_bytes=half_bytes)
    rehearsal = Rehearsal(command)
    update = rehearsal.measure(command.batch)
    own = share(update)
    room = int(command.gpu_memory * GIB) - outside(command)
    if command.zero is None and update.step + own.buffers > room:
        return Plan(command, update, own, 0)  # the optimizer's step does not fit, whatever the batch
    known = {command.batch: update}

    def bytes_of(batch: int) -> int:
        if batch not in known:
            known[batch] = rehearsal.measure(batch, steps=False)
        return share(known[batch]).total if command.zero is not None else known[batch].passes + own.buffers

    return Plan(command, update, own, largest_batch(bytes_of, command.batch, room))


def largest_batch(bytes_of: Callable[[int], int], start: int, room: int) -> int:
    """The largest batch whose bytes are at most `room`.

    Bytes grow almost in proportion to the batch, so a line through two of them says where to look; what it says is
    measured and corrected. The next larger batch is measured too where the line does not say clearly that it is too
    large.

    Args:
        bytes_of: bytes of a batch, which grow; measured, so asked few times.
        start: a batch to begin with.
        room: bytes.

    Returns:
        0 if one row does not fit; at most `LARGEST`.
    """
    other = start // 2 if start > 1 else 2
    low, high = sorted((start, other))
    slope = max((bytes_of(high) - bytes_of(low)) / (high - low), 1.0)
    guess = min(max(0, int(low + (room - bytes_of(low)) / slope)), LARGEST)
    while guess > 0 and bytes_of(guess) > room:
        guess -= max(1, int((bytes_of(guess) - room) / slope))
    guess = max(guess, 0)
    while guess < LARGEST and not (guess and bytes_of(guess) + CLEAR * slope > room) and bytes_of(guess + 1) <= room:
        guess += 1
    return guess


def outside(command: Command) -> int:
    """`OUTSIDE` on a GPU; nothing of that kind is on a CPU."""
    return OUTSIDE if command.device.type == "cuda" else 0
