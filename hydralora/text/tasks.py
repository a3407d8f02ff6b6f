"""The tasks of a run that routes by task: which there are, and that every record has one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydralora.text.adapter_flags import module_names
from hydralora.text.options import RunArguments, stored_config
from hydralora.text.samples import NO_TASK, Example
from hydralora.tuner.config import RoutingUnit
from llava.errors import BadSampleError


def asked_tasks(args: RunArguments) -> list[str] | None:
    """The tasks that the adapter to start from or `--tasks` names; [] if the data names them, None without any."""
    if args.training.peft_path:
        stored = stored_config(args.training.peft_path)
        return list(stored.tasks or ()) if stored.routing == RoutingUnit.TASK else None
    return module_names(args.training.tasks) if args.training.routing == RoutingUnit.TASK else None


def names_of(examples: Sequence[Example]) -> list[str]:
    """The tasks of examples, in order of their first one."""
    return list(dict.fromkeys(str(example.task) for example in examples))


def check_tasks(path: Path, examples: Sequence[Example], known: Sequence[str]) -> None:
    """Refuse a file with a record that the adapter could not route.

    Args:
        path: of the file.
        examples: all of its records, in order.
        known: the tasks; none: every task is right.

    Raises:
        BadSampleError: a record has no task, or another one; the message names file and row.
    """
    for row, example in enumerate(examples):
        if example.task in (NO_TASK, ""):
            raise BadSampleError(
                f"{path}, row {row}: has no task_type, by which --routing task routes; give each record one, or train "
                "with --routing token"
            )
        if known and str(example.task) not in known:
            raise BadSampleError(
                f"{path}, row {row}: has task_type {example.task!r}, and the tasks of the adapter are {list(known)}; "
                "name it in --tasks, or leave the record out"
            )
