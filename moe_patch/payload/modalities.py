"""The modality of each sample on its way through upstream's model, from the token ids to the adapters of a layer.

A sample with an image token is of the modality `image`. What upstream's code has no argument for travels with objects
that belong to one call: `generate` hands `modality_rows` from step to step, and a pass runs through a view of the model
whose layers know the routing of that pass. So a checkpointed layer that is recomputed has the routing of its own pass,
and several passes may wait for their backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mma import modality
from mma.config import MmaConfig
from mma.decoder_layer import ROUTING, LayerRouting, become
from mma.modality import Table, Witness
from mma.model import EMBEDDING, attach
from moe_patch.payload.views import like, with_children

ATTRIBUTE = "mma_modalities"
"""Where a model keeps its `Modalities`."""

ROWS = "modality_rows"
"""Argument of a model with adapters: (B,) int64, 1 for a sample with an image and 0 for one without."""

IMAGE_TOKEN_INDEX = -200
"""Upstream's token id of an image."""


class Modalities:
    """Puts adapters into a model, and gives its layers the weights of their adapters in every pass.

    Args:
        model: bare model of upstream's class, the tower loaded if it gets adapters.
        config: of the adapters.
    """

    def __init__(self, model: Any, config: MmaConfig) -> None:
        check_torch()
        self.config = config
        self._kept: tuple[Table, Witness] | None = None
        tower = model.get_vision_tower()
        attach(model, config, blocks=_blocks(tower) if config.adapters_per_block else [])
        if config.adapters_per_layer:
            become(model, routed_class(type(model)))

    def view(self, model: Any, rows: Tensor) -> Any:
        """The model for one pass: its layers know the weights of their adapters for the samples of that pass.

        Nothing is changed in the model itself, so several passes may wait for their backward pass.

        Args:
            model: bare model.
            rows: (B,) int64.
        """
        decoder = model.get_decoder()
        routing = modality.routing_of(rows.tolist(), rows.device)
        routing = dataclasses.replace(routing, table=self._table(decoder))
        layers = nn.ModuleList(
            LayerOfPass(layer, routing.at(decoder, index)[1]) for index, layer in enumerate(decoder.layers)
        )
        return with_children(model, model=with_children(decoder, layers=layers))

    def _table(self, decoder: Any) -> Table:
        """The weights of all layers: with gradient in training, otherwise kept while they hold."""
        dtype = decoder.embed_tokens.weight.dtype
        roots = [*decoder.layers, getattr(decoder, EMBEDDING)]
        if torch.is_grad_enabled() or not modality.can_be_witnessed(roots):
            self._kept = None
            return Table(modality.routing_table(decoder, dtype))
        circumstances = (dtype, torch.is_autocast_enabled())
        if self._kept is None or not self._kept[1].still_holds(roots, *circumstances):
            table = Table(modality.routing_table(decoder, dtype))
            self._kept = table, Witness(roots, *circumstances)
        return self._kept[0]


class LayerOfPass(nn.Module):
    """A decoder layer with the routing of one pass, for upstream's loop, which has no argument for it."""

    def __init__(self, layer: nn.Module, routing: LayerRouting) -> None:
        super().__init__()
        self.layer, self.routing = layer, routing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns."""
        return self.layer(*args, **{ROUTING: self.routing}, **kwargs)


@functools.cache
def routed_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a model of upstream's class `plain` that knows the modality of its samples; of the same name."""
    inner: Any = plain

    def forward(self: Any, *args: Any, modality_rows: Tensor | None = None, **kwargs: Any) -> Any:
        given = inspect.signature(inner.forward).bind(self, *args, **kwargs).arguments
        rows = _rows_of_pass(modality_rows, {**given, **kwargs})
        return inner.forward(getattr(self, ATTRIBUTE).view(self, rows), *args, **kwargs)

    def prepare_inputs_for_generation(
        self: Any, *args: Any, modality_rows: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {**inner.prepare_inputs_for_generation(self, *args, **kwargs), ROWS: modality_rows}

    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if kwargs.get(ROWS) is None and ids is not None:
            kwargs[ROWS] = _has_image(ids)
        return inner.generate(self, inputs, *args, **kwargs)

    own = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    methods = {
        function.__name__: like(getattr(plain, function.__name__), function, ROWS)
        for function in (forward, prepare_inputs_for_generation, generate)
    }
    return type(plain.__name__, (plain,), {**own, **methods})


def _has_image(ids: Tensor) -> Tensor:
    """(B,) int64: 1 for rows of `ids` (B, L) with an image token."""
    return (ids == IMAGE_TOKEN_INDEX).any(dim=1).long()


def _rows_of_pass(rows: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    """The modality of each sequence of a pass, (B,) int64.

    Args:
        rows: what the caller says; for the beams of a sample it may be said once.
        given: arguments of upstream's `forward`.

    Raises:
        ValueError: nothing says it, or for another number of sequences.
    """
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    batch = len(ids if embeddings is None else embeddings)
    if rows is None and embeddings is None and given.get("past_key_values") is None:
        return _has_image(ids)
    if rows is None or not len(rows) or batch % len(rows):
        raise ValueError(
            f"the modality of {batch} sequences is unknown ('{ROWS}' has {0 if rows is None else len(rows)}): call "
            f"generate with token ids, or pass {ROWS}, 1 for each sequence with an image and 0 for each without"
        )
    return rows.repeat_interleave(batch // len(rows))


def check_torch() -> None:
    """Raise `ValueError` if torch is older than any on which the adapters were tried."""
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 1):
        raise ValueError(f"--mma and its checkpoints need torch 2.1 or later; installed is {torch.__version__}")


def _blocks(tower: Any) -> list[nn.Module]:
    """The blocks of upstream's CLIP tower that run before the selected hidden state."""
    network = tower.vision_tower
    layers = getattr(network, "vision_model", network).encoder.layers
    last = tower.select_layer if tower.select_layer >= 0 else len(layers) + 1 + tower.select_layer
    return list(layers[:last])
