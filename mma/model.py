"""How the adapters enter a decoder and a vision tower, and how they are found there.

An adapter is a child of the norm before attention or MLP, so every module of the host keeps its name, and the
state-dict keys of the base stay what they are, quantized or not. A decoder layer passes the output of its norms through
them, see `decoder_layer.py`; in a vision tower the norm does it itself, see `tower_norm.py`.
Corresponds to `set_MMAdapter` and `set_Clip_Adapter` in `lavin/mm_adapter.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mma.config import MODALITIES, MmaConfig
from mma.decoder_layer import CHILD, AdaptedLayer, adapt, problem, release
from mma.layer import RepAdapter, RoutedRepAdapter
from mma.tower_norm import adapt_norm, norm_problem, release_norm

NORMS = (("input_layernorm", "post_attention_layernorm"), ("layer_norm1", "layer_norm2"), ("ln_1", "ln_2"))
"""Names of the norms before attention and before the MLP: decoders, CLIP and SigLIP of transformers, open_clip."""

EMBEDDING = "adapter_modality_embedding"
"""Name of the modality embedding within the decoder: the original's."""


def norms(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The norms before attention and before the MLP of a decoder layer or a block of a vision tower.

    Raises:
        ValueError: it has none of the known shapes.
    """
    for names in NORMS:
        first, second = (getattr(layer, name, None) for name in names)
        if isinstance(first, nn.Module) and isinstance(second, nn.Module):
            return first, second
    raise ValueError(f"a {type(layer).__name__} has no pair of norms under one of the names {NORMS}")


def adapters(layer: nn.Module) -> list[Any]:
    """The adapters of a layer or block, the one before attention first."""
    found = (getattr(norm, CHILD, None) for norm in norms(layer))
    return [adapter for adapter in found if isinstance(adapter, RepAdapter)]


def attach(
    model: nn.Module, config: MmaConfig, dtype: torch.dtype = torch.float32, *, blocks: Sequence[nn.Module] = ()
) -> None:
    """Put the adapters that `config` asks for in place, and the modality embedding into the decoder.

    They stand on the device of their norms (the meta device included). Fresh routed adapters change nothing; fresh
    plain ones give zero.

    Args:
        model: with `get_decoder()` and `config.hidden_size`.
        config: of the adapters.
        dtype: of the added parameters.
        blocks: those of the vision tower that run; empty without a tower.

    Raises:
        ValueError: adapters are there already, a layer has an unknown shape, or there is no tower to be adapted.
            Nothing has been changed then.
    """
    host: Any = model
    decoder, width = host.get_decoder(), host.config.hidden_size
    layers = list(decoder.layers) if config.adapters_per_layer else []
    adapted_blocks = list(blocks) if config.adapters_per_block else []
    if config.adapters_per_block and not adapted_blocks:
        raise ValueError(
            f"visual_adapter_type is '{config.visual_adapter_type}', but no block of a vision tower runs here"
        )
    if hasattr(decoder, EMBEDDING) or any(adapters(layer) for layer in (*layers, *adapted_blocks)):
        raise ValueError("the model has adapters already")
    tower_norms = [norm for block in adapted_blocks for norm in norms(block)[: config.adapters_per_block]]
    for found in filter(None, (*map(problem, layers), *map(norm_problem, tower_norms))):
        raise ValueError(found)
    for index, layer in enumerate(layers):
        for norm in norms(layer)[: config.adapters_per_layer]:
            _add(norm, _routed(width, config), dtype)
        adapt(layer, config.drop_path, index)
    for norm in tower_norms:
        if config.visual_adapter_type == "normal":
            plain = RepAdapter(_width(norm), config.adapter_dim, config.adapter_groups, config.adapter_dropout)
            _add(norm, plain, dtype)
        else:
            _add(norm, _routed(_width(norm), config), dtype)
        adapt_norm(norm)
    if layers:
        table = host.get_input_embeddings().weight
        embedding = nn.Embedding(len(MODALITIES), width, device=table.device, dtype=dtype)
        decoder.add_module(EMBEDDING, embedding.train(decoder.training))


def _width(norm: Any) -> int:
    """D_vision by the norm of a block; its weight says nothing while DeepSpeed keeps it in parts."""
    return int(norm.normalized_shape[-1])


def _routed(width: int, config: MmaConfig) -> RoutedRepAdapter:
    c = config
    return RoutedRepAdapter(width, c.adapter_dim, c.adapter_groups, c.adapter_scale, c.temperature, c.adapter_dropout)


def _add(norm: nn.Module, adapter: Any, dtype: torch.dtype) -> None:
    """Make the adapter a child of the norm."""
    device = next(norm.parameters()).device
    adapter = adapter.to_empty(device=device) if device.type == "meta" else adapter.to(device)
    norm.add_module(CHILD, adapter.to(dtype).train(norm.training))


def detach(layer: nn.Module) -> None:
    """Take the adapters of a decoder layer or a block away, with everything that was done for them."""
    for norm in norms(layer):
        if isinstance(getattr(norm, CHILD, None), RepAdapter):
            delattr(norm, CHILD)
        release_norm(norm)
    if isinstance(layer, AdaptedLayer):
        release(layer)


def added_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that `attach` added, by their name in `model`: exactly these are trained and saved."""
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    embedding = getattr(decoder, EMBEDDING, None)
    for prefix, module in model.named_modules():
        if isinstance(module, RepAdapter) or module is embedding:
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter
