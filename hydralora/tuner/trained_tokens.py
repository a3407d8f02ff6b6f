"""Tokens that adapters train one by one (`trainable_token_indices`) in a model whose head is tied to its embeddings.

PEFT trains such tokens together in both, or, where an adapter names the layers with tokens of their own, apart in each.
The layers of a model are wrapped for one of the two, by the first adapter that asks for any. Of the other kind PEFT
adds an adapter without a word, which then gives other numbers than in a model of its own, or a `KeyError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from peft.utils.other import TrainableTokensWrapper, _get_input_embeddings_name, _get_module_names_tied_with_embedding
from torch import nn


class Tying(StrEnum):
    """How trained tokens act in layers that share their weight."""

    TOGETHER = "the same in all of them"
    APART = "in the embeddings apart from the others"
    HEAD = "in others than the embeddings"


FITTING = {(Tying.TOGETHER, Tying.HEAD), (Tying.HEAD, Tying.APART)}
"""What the layers are wrapped for, and what an adapter of another kind may ask for all the same."""


def refuse_other_tying(model: nn.Module, adapter_name: str, indices: Any) -> None:
    """Refuse an adapter whose trained tokens are tied in another way than those of the adapters that are there.

    Args:
        model: the host, before the adapter is added.
        adapter_name: of the new adapter.
        indices: its `trainable_token_indices`: a list, those of layers by name, or None.

    Raises:
        ValueError: says how both are tied, and what to do.
    """
    embeddings = _get_input_embeddings_name(model)
    if not indices or embeddings is None or not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    heads = [_outermost(model, name) for name in _get_module_names_tied_with_embedding(model)]
    wanted, present = _asked(indices, embeddings, heads), _present(model, embeddings, heads)
    if None in (wanted, present) or wanted == present or (present, wanted) in FITTING:
        return
    raise ValueError(
        f"adapter '{adapter_name}': trainable_token_indices={indices} trains tokens {wanted}, of the layers "
        f"{[embeddings, *heads]}, which share their weight in this model; those of the adapters that are there act "
        f"{present}. Give all adapters of this model a list, or all of them the same layers by name, or add this "
        "adapter to a model of its own"
    )


def _outermost(model: nn.Module, name: str) -> str:
    """The name of the wrapper around a layer, which PEFT looks for within; or its own."""
    parts = name.split(".")
    names = [".".join(parts[:length]) for length in range(1, len(parts))]
    return next((outer for outer in names if isinstance(model.get_submodule(outer), TrainableTokensWrapper)), name)


def _asked(indices: Any, embeddings: str, heads: list[str]) -> Tying | None:
    """How PEFT ties the tokens of these indices; None: they are in none of the tied layers."""
    if not isinstance(indices, Mapping):
        return Tying.TOGETHER
    named = {name: list(of) for name, of in indices.items() if any(_names(name, at) for at in [embeddings, *heads])}
    if not named:
        return None
    if not any(_names(name, embeddings) for name in named):
        return Tying.HEAD
    same = all(of == next(iter(named.values())) for of in named.values())
    return Tying.TOGETHER if same else Tying.APART


def _names(name: str, layer: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _present(model: nn.Module, embeddings: str, heads: list[str]) -> Tying | None:
    """What the tied layers of a model are wrapped for; None: none of them is."""
    modules = [model.get_submodule(name) for name in heads]
    wrappers = [module for module in modules if isinstance(module, TrainableTokensWrapper)]
    if any(wrapper.token_adapter.tied_adapter is not None for wrapper in wrappers):
        return Tying.TOGETHER
    if isinstance(model.get_submodule(embeddings), TrainableTokensWrapper):
        return Tying.APART
    return Tying.HEAD if wrappers else None
