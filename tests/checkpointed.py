"""Checkpointing of a model's layers under the method's name in the installed transformers."""

from __future__ import annotations

from typing import Any

from llava.runtime.checkpointing import SWITCH


def checkpoint_layers(model: Any, options: dict[str, Any] | None = None) -> None:
    """Compute layers again in the backward pass, by the kind that keeps the graph unless `options` say otherwise."""
    getattr(model, f"{SWITCH}_enable")({"use_reentrant": False} if options is None else options)


def keep_activations(model: Any) -> None:
    """Compute no layer again."""
    getattr(model, f"{SWITCH}_disable")()
