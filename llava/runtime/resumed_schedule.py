"""The schedule of a resumed run: as long as it was, or with the rates that changed options ask for.

A checkpoint's optimizer and schedule contain the learning rate, weight decay and betas that they were made with, and
loading them puts those in place again. After an accepted change, the values of now have to hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from llava.errors import FlagError
from llava.runtime.files import read_json

RATE, BASE_RATE = "lr", "initial_lr"
"""Keys of a group of parameters: its rate in this update, and the rate that the schedule is a multiple of."""


def check_length(folder: Path, updates: int, may_differ: bool, changes: Sequence[str]) -> list[str]:
    """Refuse a run that is longer or shorter than that of the checkpoint, and changes after the last update.

    Rows, processes and epochs decide the number of updates, so it may differ although no option does.

    Args:
        folder: the checkpoint.
        updates: of the whole run, as it is now.
        may_differ: the schedule does not depend on the number, or a difference is accepted.
        changes: accepted differences of options.

    Returns:
        The accepted difference, in a line; none if there is none.

    Raises:
        FlagError: names the numbers of updates, and the file with the earlier one.
    """
    path = folder / TRAINER_STATE_NAME
    state = read_json(path)
    made, planned = state["global_step"], state["max_steps"]
    found = [] if planned == updates else [f"updates of the whole run: {planned} then, {updates} now"]
    if found and not may_differ:
        raise FlagError(
            f"{folder}: cannot be resumed under a changed schedule; according to {path}:\n  {found[0]}\nThe number of "
            "rows, processes or epochs is another. Give what there was then, or another --output_dir; "
            "--resume_changed True continues with this change"
        )
    if made > updates:
        raise FlagError(
            f"{folder}: has made {made} updates, more than the {updates} of this run; start it in another --output_dir"
        )
    if made == updates and changes:
        raise FlagError(
            f"{folder}: all {made} updates of its run are made, so that changed options would change nothing but its "
            "record:\n  " + "\n  ".join(changes) + "\nGive the options of then, a longer run, or another --output_dir"
        )
    return found


def own_settings(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each group of parameters, as the options of now say; to be asked for before a state is loaded."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def apply_settings(optimizer: Any, schedule: Any, settings: Sequence[dict[str, Any]]) -> None:
    """Let settings hold in place of those that came with a loaded state; the schedule stays where it is.

    Args:
        optimizer: with its state loaded.
        schedule: of the learning rate, loaded too.
        settings: of `own_settings`, in the order of the groups.

    Raises:
        FlagError: the schedule is of a kind whose rate does not follow from the update.
    """
    factors = getattr(schedule, "lr_lambdas", None)
    if factors is None:
        raise FlagError("--resume_changed True: this --lr_scheduler_type goes by the loss; it cannot be changed")
    schedule.base_lrs = [each.get(BASE_RATE, each[RATE]) for each in settings]
    reached = [factor(schedule.last_epoch) for factor in factors]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, reached, strict=True)]
    for group, own, rate in zip(optimizer.param_groups, settings, schedule._last_lr, strict=True):
        group.update(own | {RATE: rate})
