"""Checks of the values of supported options: what transformers would answer with a traceback, or not carry out.

Each returns the reason for a refusal and what to do instead; see `Check`.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import AcceleratorConfig

from llava.runtime.monitoring.stopping import NEEDS_EVALUATIONS
from llava.runtime.trainer_options.row import Check

NEEDS_MODEL = frozenset(
    [
        *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise"),
        *("galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise"),
    ]
)
"""Optimizers that choose their parameters from the modules of a model, and replace the run's parameter groups."""

UPDATES_IN_BACKWARD = frozenset({"lomo", "adalomo"})
AVERAGES = frozenset({"schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"})
GONE = {
    "adamw_torch_xla": "TPUs are not supported",
    "adamw_torch_npu_fused": "Ascend NPUs are not supported",
    "adamw_anyprecision": "it needs torchdistx, which is no longer developed",
}
INSTEAD_OF_OPTIMIZER = "use adamw_torch, or adamw_bnb_8bit or adafactor where memory is short"

ACCELERATOR = {"non_blocking", "use_seedable_sampler"}
"""Keys of `--accelerator_config` that may be set."""

BACKENDS = ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl")
SAMPLING = ("random", "sequential", "group_by_length")
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
TOKEN_COUNTS = ("all", "non_padding", "no")


def text(value: Any) -> str:
    """A value as it is written: enumerations have one."""
    return str(getattr(value, "value", value))


def one_of(name: str, allowed: Collection[str], instead: str = "") -> Check:
    """A check of an option that has a fixed set of values."""

    def check(options: Any) -> str | None:
        value = getattr(options, name)
        if value is None or text(value) in allowed:
            return None
        return f"must be one of {', '.join(allowed)}" + (f"; {instead}" if instead else "")

    return check


def optimizer(options: Any) -> str | None:
    """Optimizers that cannot be used with this project's parameter groups and checkpoints."""
    name = text(options.optim)
    if name in NEEDS_MODEL:
        return f"makes its own parameter groups, so that the rates of a run get lost; {INSTEAD_OF_OPTIMIZER}"
    if name in UPDATES_IN_BACKWARD:
        return f"updates weights in the backward pass, before a gradient can be checked; {INSTEAD_OF_OPTIMIZER}"
    if name in AVERAGES:
        return f"keeps its averaged weights apart, so that checkpoints would not have them; {INSTEAD_OF_OPTIMIZER}"
    return f"{GONE[name]}; {INSTEAD_OF_OPTIMIZER}" if name in GONE else None


def schedule(options: Any) -> str | None:
    """Schedules that follow a score."""
    if text(options.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy") and not evaluates(options):
        return "follows the results of evaluations; pass --eval_strategy too, or another schedule, as cosine"
    return None


def evaluates(options: Any) -> bool:
    """True if evaluations are made while training."""
    return text(options.eval_strategy) != "no"


def with_evaluations(name: str) -> Check:
    """A check of an option that compares or makes evaluations."""

    def check(options: Any) -> str | None:
        on = text(options.save_strategy) == "best" if name == "save_strategy" else getattr(options, name)
        if not on or evaluates(options):
            return None
        return NEEDS_EVALUATIONS

    return check


def json_object(name: str) -> Check:
    """A check of an option that is a JSON object on the command line."""

    def check(options: Any) -> str | None:
        value = getattr(options, name)
        if value is None or isinstance(value, dict):
            return None
        try:
            return None if isinstance(json.loads(str(value)), dict) else 'must be a JSON object, as {"key": 1}'
        except ValueError as error:
            return f'must be a JSON object, as {{"key": 1}} ({error})'

    return check


def accelerator(options: Any) -> str | None:
    """Settings of accelerate that would change which rows an update has, or that nothing reads."""
    value = options.accelerator_config
    if value is None:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    elif isinstance(value, str):
        try:
            value = json.loads(value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"is neither a JSON object nor a file of one ({error}); pass one, or leave it out"
    if not isinstance(value, dict):
        return "is not a JSON object; pass one, or leave it out"
    usual = AcceleratorConfig()
    others = sorted(
        key for key in value.keys() - ACCELERATOR if not hasattr(usual, key) or value[key] != getattr(usual, key)
    )
    if not others:
        return None
    return (
        f"{', '.join(others)} would change which rows an update has, so that a resumed run would differ; "
        f"only {', '.join(sorted(ACCELERATOR))} may be set"
    )


def of_fsdp(options: Any) -> str | None:
    """Settings of FSDP where it is off."""
    return None if options.fsdp or not options.fsdp_config else "has no effect without --fsdp; pass --fsdp full_shard"


def workers(name: str) -> Check:
    """A check of an option about processes that prepare data: there must be some."""

    def check(options: Any) -> str | None:
        if options.dataloader_num_workers:
            return None
        return "belongs to processes that prepare data; pass --dataloader_num_workers too, or leave it out"

    return check


def start_method(options: Any) -> str | None:
    """The way in which data processes start."""
    methods = multiprocessing.get_all_start_methods()
    if options.dataloader_multiprocessing_context not in (None, *methods):
        return f"must be one of {', '.join(methods)}"
    return workers("dataloader_multiprocessing_context")(options)


def in_order(options: Any) -> str | None:
    """Batches in the order in which they happen to be ready."""
    if options.dataloader_in_order:
        return None
    return "the order of batches would depend on chance, so that no run could be repeated or resumed; leave it out"


def sampling(options: Any) -> str | None:
    """Ways to draw the order of rows."""
    value = options.train_sampling_strategy
    if value in SAMPLING and value != "random" and getattr(options, "group_by_modality_length", False):
        return "--group_by_modality_length True draws another order; leave one of them out"
    if value == "batch_rebalance":
        return "needs the tokens of every row before the run, so that each image would be opened; use group_by_length"
    return one_of("train_sampling_strategy", SAMPLING)(options)


def reporters(options: Any) -> str | None:
    """Trackers that do not exist or are not installed."""
    from transformers.integrations import integration_utils

    known: Iterable[str] = integration_utils.INTEGRATION_TO_CALLBACK
    wanted = options.report_to
    names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    unknown = [name for name in names if name not in (*known, "all", "none")]
    if unknown:
        return f"must be one of {', '.join(known)}, all or none"
    installed = integration_utils.get_available_reporting_integrations()
    absent = [name for name in names if name not in (*installed, "all", "none")]
    if absent:
        return f"needs the package of {', '.join(absent)}, which is not installed; install it, or pass --report_to none"
    return None


def tf32(options: Any) -> str | None:
    """TF32 needs hardware that has it."""
    if options.tf32 and (
        options.use_cpu or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0)
    ):
        return "needs a GPU of NVIDIA's Ampere generation or later; leave it out"
    return None


def precision(options: Any) -> str | None:
    """Both kinds of half precision at once."""
    return "--bf16 True as well; give one of them" if options.fp16 and options.bf16 else None


def token_counts(options: Any) -> str | None:
    """How input tokens are counted."""
    value = options.include_num_input_tokens_seen
    return (
        None
        if isinstance(value, bool) or str(value).lower() in ("true", "false")
        else one_of("include_num_input_tokens_seen", TOKEN_COUNTS)(options)
    )


def label_names(options: Any) -> str | None:
    """What the targets of a batch are called."""
    if list(options.label_names or ["labels"]) == ["labels"]:
        return None
    return "the targets of a batch are called labels; leave it out"


def debug(options: Any) -> str | None:
    """Tools of transformers for finding errors."""
    words = options.debug.split() if isinstance(options.debug, str) else [text(word) for word in options.debug or ()]
    if all(word == "underflow_overflow" for word in words):
        return None
    return "only underflow_overflow is supported; a run stops by itself at a loss that is not finite"


CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "every_n_layers")
"""Settings of `--activation_checkpointing_kwargs`: those of `torch.utils.checkpoint`, and one of transformers."""


def checkpointing(options: Any) -> str | None:
    """Settings of activation checkpointing that nobody reads; both of its names are looked at."""
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        value = getattr(options, name, None)
        problem = json_object(name)(options) if hasattr(options, name) else None
        if problem is not None:
            return problem
        given = json.loads(value) if isinstance(value, str) else value or {}
        unknown = sorted(given.keys() - set(CHECKPOINTING))
        if unknown:
            return f"{', '.join(unknown)} is not among the settings {', '.join(CHECKPOINTING)}"
    return None
