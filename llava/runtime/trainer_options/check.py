"""The table applied to the options of a run: refusals before anything is loaded, and a warning of what has no row.

`option_problems` sees the options before transformers has read them, `trial_problems` afterwards: optimizer and
schedule are made once for a single weight, so that what they refuse is said before the model is loaded.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn

from llava.runtime.trainer_options.row import Kind, Row, Table
from llava.runtime.trainer_options.table import unknown_fields
from llava.runtime.trainer_options.values import text

OFF: tuple[Any, ...] = (None, False, "", [], {})
"""Values that switch a refused option off, as its default does."""


class UnknownOptionWarning(UserWarning):
    """transformers has options that this project has not been tested with."""


def defaults_of(options: type) -> dict[str, Any]:
    """The default of each field of a dataclass."""
    found = {}
    for field in dataclasses.fields(options):
        made = field.default_factory
        found[field.name] = field.default if made is dataclasses.MISSING else made()
    return found


def option_problems(training: transformers.TrainingArguments, table: Table) -> list[str]:
    """What of a run's options is refused, one line each with flag, value, reason and what to do instead.

    Args:
        training: before its `__post_init__`.
        table: of the program.
    """
    defaults = defaults_of(type(training))
    problems = []
    for name, row in table.items():
        value = getattr(training, name, None)
        if name not in defaults or value == defaults[name]:
            continue
        reason = _reason(row, value, training)
        if reason is not None:
            problems.append(f"--{name} {text(value)}: {reason}")
    return problems


def _reason(row: Row, value: Any, training: transformers.TrainingArguments) -> str | None:
    """Why a value that is not the default is refused, or None."""
    if row.kind is Kind.REFUSED:
        return None if value in OFF else f"is not supported: {row.text}; {row.instead}"
    return None if row.check is None else row.check(training)


LAUNCHED = {
    "ACCELERATE_USE_FSDP": ("true", "accelerate launch --use_fsdp", "pass --fsdp full_shard to the program"),
    "ACCELERATE_USE_MEGATRON_LM": (
        "true",
        "accelerate launch --use_megatron_lm",
        "use --deepspeed scripts/zero3.json",
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", "accelerate launch --use_parallelism_config", "leave it out"),
}
"""What a launcher switches on in the environment: value of the variable, the option, what to do instead."""


def launcher_problems() -> list[str]:
    """What `accelerate launch` switches on by the environment, which is refused as its flag would be."""
    return [
        f"{launcher} ({name}={os.environ[name]}): is not supported; {instead}"
        for name, (value, launcher, instead) in LAUNCHED.items()
        if os.environ.get(name, "").lower() == value
    ]


@functools.cache
def warn_of_unknown_fields(names: tuple[str, ...] = ()) -> None:
    """Warn once of options that a newer transformers has and the table does not.

    Args:
        names: of the fields; none given: those of the installed version without a row.
    """
    unknown: Iterable[str] = names or unknown_fields()
    for name in unknown:
        warnings.warn(
            f"--{name} of transformers {transformers.__version__} is newer than every version that this project was "
            "tested with: whether it has an effect here is not known. Leave it out, or install a tested version.",
            UnknownOptionWarning,
            stacklevel=3,
        )


def trial_problems(training: transformers.TrainingArguments) -> list[str]:
    """What is wrong with optimizer and schedule; they are made for one weight, and updated once.

    Args:
        training: after its `__post_init__`.
    """
    weight = nn.Parameter(torch.zeros(8, 8, device=training.device))
    weight.grad = torch.zeros_like(weight)
    name = text(training.optim)
    try:
        unread = _unread_optimizer_options(training)
        optimizer_class, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(training)
        optimizer = optimizer_class([weight], **settings)
        optimizer.step()
    except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        given = f", --optim_args {training.optim_args}" if training.optim_args else ""
        return [f"--optim {name}{given}: cannot be made here ({_line(error)}); use adamw_torch, without --optim_args"]
    problems = []
    if unread:
        problems.append(f"--optim_args {training.optim_args}: {name} does not read {', '.join(unread)}; leave it out")
    return problems + _schedule_problems(training, optimizer)


MANY_UPDATES = 100_000
"""Length of the trial of a schedule where the run's is not known yet."""


def _schedule_problems(training: transformers.TrainingArguments, optimizer: torch.optim.Optimizer) -> list[str]:
    updates = training.max_steps if training.max_steps > 0 else MANY_UPDATES
    settings = training.lr_scheduler_kwargs or {}
    try:
        transformers.get_scheduler(
            training.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=training.get_warmup_steps(updates),
            num_training_steps=updates,
            scheduler_specific_kwargs=dict(settings),
        )
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        given = f" with --lr_scheduler_kwargs {json.dumps(settings)}" if settings else ""
        return [
            (
                f"--lr_scheduler_type {text(training.lr_scheduler_type)}{given}: the schedule cannot be made "
                f"({_line(error)}); pass the settings that it needs by --lr_scheduler_kwargs, and no others"
            )
        ]
    return []


def _unread_optimizer_options(training: transformers.TrainingArguments) -> list[str]:
    """Names in `--optim_args` without which the optimizer would be the same."""
    given = [word.partition("=")[0].strip() for word in (training.optim_args or "").split(",") if word.strip()]
    if not given:
        return []

    def made(words: str | None) -> Any:
        return transformers.Trainer.get_optimizer_cls_and_kwargs(_with(training, words))

    whole, words = made(training.optim_args), str(training.optim_args).split(",")
    return [name for place, name in enumerate(given) if made(",".join(words[:place] + words[place + 1 :])) == whole]


def _with(training: transformers.TrainingArguments, optim_args: str | None) -> Any:
    """A copy of the options with other `--optim_args`, whose `__post_init__` is not run again."""
    copied = copy.copy(training)
    copied.optim_args = optim_args or None
    return copied


def _line(error: Exception) -> str:
    """The first sentence of an error of a library."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
