"""The modality token without a place in the sequence: the weights of the adapters as a function of the modality.

In the original the modality token stands in front of the sequence, sees only itself and is seen by nobody. So what it
becomes from layer to layer, and with it the routing, depends on the modality alone: two rows of length one say it for
every batch. In training they go through each layer just before the batch does, with exact gradients. At inference they
go through once, and the table of weights (layers, modalities, adapters, up-projections) serves all sequences until the
weights it followed from may have changed. Corresponds to `lavin/model.py: Transformer.forward` and `insert_modality`.

Shape letters: B batch, D width, A adapters of a layer, h hidden width of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mma.config import MODALITIES
from mma.decoder_layer import FIRST_POSITION, ROUTING, PassRouting
from mma.layer import Mixed
from mma.model import EMBEDDING, adapters


@dataclass(frozen=True)
class Table:
    """The routing of all layers.

    Attributes:
        weights: (layers, modalities, A, 2) float32.
        kept: what the weights make of the adapters of all layers: for each modality alone, and last for all of them;
            empty where the adapters are to mix by the weights, so that gradients reach all their parameters.
        chosen: (modalities, entries), for each modality the hidden entries that are its own in the last of these.
    """

    weights: Tensor
    kept: tuple[PassRouting, ...] = ()
    chosen: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """What goes with a batch from layer to layer; never changed in place.

    Attributes:
        modalities: (B,) int64, row of the modality embedding for each sample; (B, L) where rows have several samples.
        alike: the row of all samples, or None if they differ.
        table: if it is known for all layers.
        tokens: (modalities, 1, D), the modality tokens as they enter the next layer, where there is no table.
    """

    modalities: Tensor
    alike: int | None
    table: Table | None = None
    tokens: Tensor | None = None

    def known(self) -> PassRouting | None:
        """The routing of all layers for these samples, in one operation at most; None without a kept table."""
        table = self.table
        if table is None or not table.kept:
            return None
        if self.alike is not None:
            return table.kept[self.alike]
        assert table.chosen is not None  # noqa: S101  # it comes with `kept`
        chosen = table.chosen[self.modalities.to(table.chosen.device)]
        return PassRouting(table.kept[-1].layers, chosen if chosen.ndim > 2 else chosen[:, None])

    def at(self, decoder: nn.Module, index: int) -> tuple[Routing, Tensor]:
        """The routing behind decoder layer `index`, and the weights (B, A, 2) that this layer is to be called with.

        Without a table the modality tokens go through the layer.
        """
        table, tokens = self.table, self.tokens
        if table is not None:
            own = table.weights[index]  # (modalities, A, 2)
        else:
            assert tokens is not None  # noqa: S101  # one of the two is there
            tokens, own = advance(decoder, index, tokens)
        return replace(self, tokens=tokens), own[self.modalities.to(own.device)]  # (B, A, 2) or (B, L, A, 2)


def start(decoder: Any, dtype: torch.dtype) -> Tensor:
    """The modality tokens as they enter the first layer, (modalities, 1, D)."""
    embedding = getattr(decoder, EMBEDDING)
    return embedding(torch.arange(len(MODALITIES), device=embedding.weight.device))[:, None].to(dtype)


def advance(decoder: Any, index: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Take the modality tokens through one layer.

    A token that sees only itself needs neither mask nor cache, and has the same output at every position.

    Args:
        decoder: of transformers' shape; in transformers 4 its layers make the rotary embeddings themselves.
        index: of the layer.
        tokens: (modalities, 1, D).

    Returns:
        The tokens behind the layer (modalities, 1, D), and the weights of the layer's adapters (modalities, A, 2).
    """
    arguments: dict[str, Any] = {"position_ids": torch.zeros(1, 1, dtype=torch.long, device=tokens.device)}
    if hasattr(decoder, "rotary_emb"):
        arguments["position_embeddings"] = decoder.rotary_emb(tokens, **arguments)
    arguments[ROUTING] = FIRST_POSITION
    tokens, weights = decoder.layers[index](tokens, attention_mask=None, use_cache=False, **arguments)
    return tokens, _Anchored.apply(weights, tokens)


class _Anchored(torch.autograd.Function):
    """The weights as they are; in the backward pass the tokens behind their layer get a gradient too, of zeros.

    Behind the last layer nobody needs the tokens, and without their gradient the backward pass would enter that layer
    in its middle, where ZeRO-3 has not made its parameters whole.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, tokens: Tensor) -> Tensor:
        ctx.set_materialize_grads(True)
        ctx.like = tokens.shape, tokens.dtype, tokens.device
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        shape, dtype, device = ctx.like
        return gradient, torch.zeros(shape, dtype=dtype, device=device)


def routing_table(decoder: Any, dtype: torch.dtype) -> Tensor:
    """The weights of all adapters for each modality, (layers, modalities, A, 2) float32.

    Args:
        decoder: with adapters.
        dtype: of the hidden states.
    """
    tokens, rows = start(decoder, dtype), []
    for index in range(len(decoder.layers)):
        tokens, own = advance(decoder, index, tokens)
        rows.append(own.to(rows[0].device) if rows else own)
    return torch.stack(rows)


def kept_table(decoder: Any, dtype: torch.dtype) -> Table:
    """The routing of all layers with what it makes of the adapters; arguments as of `routing_table`."""
    weights = routing_table(decoder, dtype)
    layers = []  # (modalities and all of them together) for each adapter of each layer
    for own, found in zip(weights, map(adapters, decoder.layers), strict=True):
        layers.append(tuple(a.mixed(own[:, i].to(a.conv_B.weight.device)) for i, a in enumerate(found)))
    together = layers[0][0][0].shape[0]
    width = together // len(MODALITIES)  # h + 1
    kept = [
        PassRouting(tuple(tuple(_part(each, place, width) for each in layer) for layer in layers))
        for place in range(len(MODALITIES))
    ]
    chosen = torch.eye(len(MODALITIES), device=weights.device).repeat_interleave(width, dim=1)
    return Table(weights, (*kept, PassRouting(tuple(layers))), chosen.to(layers[0][0][2].dtype))


def _part(adapter: Mixed, place: int, width: int) -> Mixed:
    """The adapter of one modality out of that of all of them."""
    down, bias, up = (each[place * width : (place + 1) * width] for each in adapter)
    return down, bias, up


class Witness:
    """Notices when something that a table followed from may have changed.

    Compared are all modules, parameters and buffers by identity, tensors by version and address, and the plain
    attributes of modules (scales, switches of LoRA, training mode). What it cannot see is a write through
    `parameter.data` into memory that stays where it is, nor a `parameter.data` that was set twice between two passes
    and came to lie at its old address again; this project has neither outside of training, and a pass with gradients
    or in training mode discards the table.

    Args:
        roots: modules that the table followed from.
        circumstances: plain values that it depended on beside them.
    """

    def __init__(self, roots: Iterable[nn.Module], *circumstances: Any) -> None:
        objects, facts = _observe(roots)
        self._objects: list[ReferenceType[Any]] = [ref(item) for item in objects]
        self._facts = [*facts, circumstances]

    def still_holds(self, roots: Iterable[nn.Module], *circumstances: Any) -> bool:
        """True if nothing has changed since."""
        objects, facts = _observe(roots)
        return (
            len(objects) == len(self._objects)
            and all(then() is now for then, now in zip(self._objects, objects, strict=True))
            and [*facts, circumstances] == self._facts
        )


def can_be_witnessed(roots: Iterable[nn.Module]) -> bool:
    """False where a table must not be kept.

    Layers in training mode draw dropout; processes that share ZeRO-3's parameters have to gather them in step; tensors
    that were made in inference mode have no version.
    """
    return not any(
        module.training or any(hasattr(tensor, "ds_id") or tensor.is_inference() for tensor in _tensors(module))
        for root in roots
        for module in root.modules()
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for held in (module._parameters, module._buffers):
        yield from (tensor for tensor in held.values() if tensor is not None)


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}
"""Attributes that torch gives to every module; those that matter here are looked at one by one."""


def _observe(roots: Iterable[nn.Module]) -> tuple[list[Any], list[Any]]:
    """All modules and tensors below `roots`, and what there is to compare about them.

    Looked at once per sequence, so it is written to be quick.
    """
    objects: list[Any] = []
    facts: list[Any] = []
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        objects.append(module)
        held = module.__dict__
        facts += [_plain(value) for name, value in held.items() if name not in _OF_EVERY_MODULE]
        facts += [*held["_forward_hooks"]], [*held["_forward_pre_hooks"]]
        for tensor in _tensors(module):
            objects.append(tensor)
            facts += tensor._version, 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
        waiting += [child for child in held["_modules"].values() if child is not None]
    return objects, facts


_PLAIN = (bool, int, float, str)


def _plain(value: Any) -> Any:
    """The value itself if it is plain, a copy of the plain parts of a container, None for everything else."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return [(key, item if isinstance(item, _PLAIN) else None) for key, item in value.items()]
    if isinstance(value, list | tuple | set):
        return [item if isinstance(item, _PLAIN) else None for item in value]
    return None


def routing_of(has_image: Sequence[bool], device: torch.device) -> Routing:
    """The routing of a batch before the first layer, as far as its samples say it.

    Args:
        has_image: of each sample.
        device: of the hidden states.
    """
    rows = [int(image) for image in has_image]
    return Routing(torch.tensor(rows, device=device), rows[0] if len(set(rows)) == 1 else None)
