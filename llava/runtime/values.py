"""Numbers of a training run that would train nothing, or backwards, refused as soon as they are read.

The table is about options of transformers' `TrainingArguments`, which takes most of them silently: `--max_steps 0`
trains by epochs, a negative rate climbs. What each program adds has a table next to its options. Legitimate are, as in
transformers: `--warmup_steps 0`, `--weight_decay 0`, `--max_grad_norm 0` (no clipping) or `inf` (the norm is logged),
`--save_total_limit 0` (no limit), and a learning rate of 0 for one of several groups, which then stays as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from llava.errors import FlagError, LlavaError
from llava.runtime.ranges import COUNT, FINITE, NOT_NEGATIVE, POSITIVE, PROBABILITY, Range, range_problems

TRAINING_RANGES: dict[str, Range] = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "adam_beta1": PROBABILITY,
    "adam_beta2": PROBABILITY,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": Range(0, infinite=True, hint="0 switches clipping off"),
    "label_smoothing_factor": PROBABILITY,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "logging_steps": NOT_NEGATIVE,
    "save_steps": NOT_NEGATIVE,
    "eval_steps": NOT_NEGATIVE,
    "eval_delay": NOT_NEGATIVE,
    "eval_accumulation_steps": COUNT,
    "torch_empty_cache_steps": COUNT,
    "seed": Range(0, 2**32 - 1),
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
}

BY_STEPS = {"logging_strategy": "logging_steps", "save_strategy": "save_steps", "eval_strategy": "eval_steps"}
"""Options that count updates, if a strategy says `steps`."""


def value_problems(training: transformers.TrainingArguments, own: Mapping[str, Range]) -> list[str]:
    """What is wrong with the numbers of a run, one line each.

    Args:
        training: before its `__post_init__`.
        own: ranges of the program's own options.
    """
    epochs = FINITE if training.max_steps > 0 else POSITIVE  # not read beside a number of updates
    others = {item.name: FINITE for item in dataclasses.fields(training)}
    problems = range_problems(training, others | TRAINING_RANGES | dict(own) | {"num_train_epochs": epochs})
    if training.max_steps == 0 or training.max_steps < -1:
        problems.append(f"--max_steps {training.max_steps}: must be at least 1, or -1 to train for --num_train_epochs")
    for strategy, steps in BY_STEPS.items():
        if getattr(training, strategy) == "steps" and getattr(training, steps) == 0:
            problems.append(f"--{steps} 0: must be more than 0 with --{strategy} steps")
    return problems


def refuse(problems: Sequence[str]) -> None:
    """Raise if there are problems.

    Raises:
        FlagError: lists every problem, one per line.
    """
    if problems:
        raise FlagError("this run cannot start:\n  " + "\n  ".join(problems))


def parse(parser: transformers.HfArgumentParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """The option classes of a parser, and the words that it does not know.

    Raises:
        FlagError: a value is refused, by us or by transformers.
    """
    try:
        return parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False, return_remaining_strings=True)
    except ValueError as error:
        if isinstance(error, LlavaError):
            raise
        raise FlagError(f"this run cannot start:\n  {error}") from error


def written_names(parser: transformers.HfArgumentParser, argv: Sequence[str]) -> frozenset[str]:
    """Names of the options in a command line; the parser has no defaults afterwards."""
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return frozenset(vars(parser.parse_known_args(list(argv))[0]))


def too_few_rows(rows: int, batch_size: int, processes: int, flag: str) -> str | None:
    """What is wrong where `--dataloader_drop_last` leaves no batch, or None.

    Args:
        rows: of the data.
        batch_size: rows in a batch of one process.
        processes: that share the rows.
        flag: of the batch size.
    """
    if rows >= batch_size * processes:
        return None
    return (
        f"--dataloader_drop_last True: {rows} rows are fewer than one batch of {batch_size * processes} ({flag} "
        f"{batch_size} times {processes} process(es)), so nothing would be left; pass False, or a smaller {flag}"
    )
