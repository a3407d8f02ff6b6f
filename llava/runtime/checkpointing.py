"""Activation checkpointing under both of its names, and always of the kind that keeps the graph.

transformers 5.24 renamed `gradient_checkpointing` to `activation_checkpointing` and mirrors the old fields from the new
ones when the options are parsed, not afterwards. Both spellings of the flags are accepted on every version.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

SPELLINGS = ("activation_checkpointing", "gradient_checkpointing")
"""The switch, newest name first; the options are under the same name with `_kwargs`."""

SWITCH = next(name for name in SPELLINGS if name in {field.name for field in fields(TrainingArguments)})
"""Name of the switch in the installed transformers."""

OPTIONS = f"{SWITCH}_kwargs"
"""Name of the options in the installed transformers."""

FLAGS = {f"{name}{end}": f"{SWITCH}{end}" for name in SPELLINGS for end in ("", "_kwargs")}
"""Every spelling of a flag, and the one that the installed transformers reads."""


def is_checkpointed(training: TrainingArguments) -> bool:
    """True if layers are computed again in the backward pass."""
    return bool(getattr(training, SWITCH))


def asks_for_reentrant(training: TrainingArguments) -> bool:
    """True if the options name the kind of checkpointing that hides inner tensors from a loss."""
    return bool((getattr(training, OPTIONS) or {}).get("use_reentrant"))


def keep_the_graph(training: TrainingArguments) -> None:
    """Choose the non-reentrant kind where the options do not say; torch reads silence as the other one."""
    if not is_checkpointed(training):
        return
    options: dict[str, Any] = {"use_reentrant": False} | (getattr(training, OPTIONS) or {})
    for name in SPELLINGS:
        if hasattr(training, f"{name}_kwargs"):
            setattr(training, f"{name}_kwargs", options)


def switch_on(model: Any, training: TrainingArguments) -> None:
    """Let a model compute its layers again in the backward pass, with the options of a run, as the Trainer does."""
    enable = getattr(model, f"{SWITCH}_enable", None) or model.gradient_checkpointing_enable
    enable(getattr(training, OPTIONS))
