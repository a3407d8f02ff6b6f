"""The kind of gradient checkpointing under which what a layer reports on the side keeps its gradient."""

from __future__ import annotations

from typing import Any


def keep_the_graph(training_args: Any, otherwise: str) -> None:
    """Choose the kind that is not re-entrant.

    Args:
        training_args: with `--gradient_checkpointing True`.
        otherwise: what goes wrong under the other kind, for messages.

    Raises:
        ValueError: the flags ask for the other kind, or this transformers has no choice.
    """
    if not hasattr(training_args, "gradient_checkpointing_kwargs"):
        raise ValueError(
            "--gradient_checkpointing True: this transformers knows the re-entrant kind alone, under which "
            f"{otherwise}; pass False"
        )
    chosen = dict(training_args.gradient_checkpointing_kwargs or {})
    if chosen.get("use_reentrant"):
        raise ValueError(f"--gradient_checkpointing_kwargs asks for use_reentrant, under which {otherwise}")
    training_args.gradient_checkpointing_kwargs = {**chosen, "use_reentrant": False}
