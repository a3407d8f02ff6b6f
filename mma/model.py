"""How the adapters enter a decoder and a vision tower, and how they are found there.

An adapter is a child of the norm in front of attention or MLP and changes its output by a forward hook. So every module
of the host stays what it is: of its class, under its name, with the state-dict keys of the base, quantised or not.
Corresponds to `set_MMAdapter` and `set_Clip_Adapter` in `lavin/mm_adapter.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mma.config import MmaConfig
from mma.layer import RepAdapter, RoutedRepAdapter

NORMS = (("input_layernorm", "post_attention_layernorm"), ("layer_norm1", "layer_norm2"), ("ln_1", "ln_2"))
"""Names of the norms before attention and before the MLP: decoders, CLIP and SigLIP of transformers, open_clip."""

CHILD = "adapter"
"""Name of the adapter within its norm."""

EMBEDDING = "adapter_modality_embedding"
"""Name of the modality embedding within the decoder: the original's."""

MODALITIES = ("text", "image")
"""Rows of the modality embedding."""

ROUTING = "modality_routing"
"""Keyword under which a decoder layer is told the weights of its adapters; `modality.py` says what it may hold."""


_PRESENT = threading.local()
"""Of the decoder layer that each thread is in: its adapters, and by whose weights they are to mix."""


class WayUp(NamedTuple):
    """What `RoutedRepAdapter.mixed_up` gave, for a batch: (D, h + 1) or (B, D, h + 1)."""

    matrix: Tensor


class ModalityAdapter(RoutedRepAdapter):
    """A routed adapter of the decoder; its layer tells it by whose weights to mix."""

    @property
    def source(self) -> Tensor | WayUp | list[Tensor] | None:
        """None outside of a pass of the layer in this thread.

        During one, weights (B, 2), or what they make of the ways up; or a list, and then every sequence is routed by
        its own first position and the weights are noted there.
        """
        return getattr(_PRESENT, "sources", {}).get(self)

    def adapt(self, x: Tensor) -> Tensor:
        """The input (B, L, D) with its update.

        Raises:
            RuntimeError: the layer was called without weights, past the seams of the model.
        """
        source = self.source
        if source is None:
            raise RuntimeError(
                f"a decoder layer with adapters was called without '{ROUTING}'; call the model, which routes by the "
                "modality of each sample"
            )
        if isinstance(source, WayUp):
            return self.through(x, source.matrix.to(x.device))
        if isinstance(source, Tensor):
            return self(x, source.to(x.device))
        routing = self.route(x[:, 0])  # (B, 2)
        source.append(routing)
        return self(x, routing)


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
    model: nn.Module,
    blocks: Sequence[nn.Module],
    block_width: int,
    config: MmaConfig,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Put the adapters that `config` asks for in place, and the modality embedding into the decoder.

    They stand on the device of their norms (the meta device included). Fresh routed adapters change nothing; fresh
    plain ones give zero.

    Args:
        model: with `get_decoder()` and `config.hidden_size`.
        blocks: those of the vision tower that run; empty without a tower.
        block_width: D_vision.
        config: of the adapters.
        dtype: of the added parameters.

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
    for layer in layers:
        for norm in norms(layer)[: config.adapters_per_layer]:
            _add(norm, _routed(ModalityAdapter, width, config), dtype, _adapt_by_modality)
        hooks = adapters(layer)[0].hooks
        hooks.append(layer.register_forward_pre_hook(_take_routing, with_kwargs=True))
        hooks.append(layer.register_forward_hook(_drop_routing, always_call=True))
        if config.drop_path:
            hooks += _add_drop_path(layer, config.drop_path)
    for block in adapted_blocks:
        for norm in norms(block)[: config.adapters_per_block]:
            if config.visual_adapter_type == "normal":
                plain = RepAdapter(block_width, config.adapter_dim, config.adapter_groups, config.adapter_dropout)
                _add(norm, plain, dtype, _adapt)
            else:
                _add(norm, _routed(RoutedRepAdapter, block_width, config), dtype, _adapt_by_token)
    if layers:
        table = host.get_input_embeddings().weight
        embedding = nn.Embedding(len(MODALITIES), width, device=table.device, dtype=dtype)
        decoder.add_module(EMBEDDING, embedding.train(decoder.training))


def _routed(kind: type[RoutedRepAdapter], width: int, config: MmaConfig) -> RoutedRepAdapter:
    c = config
    return kind(width, c.adapter_dim, c.adapter_groups, c.adapter_scale, c.temperature, c.adapter_dropout)


def _add(norm: nn.Module, adapter: Any, dtype: torch.dtype, hook: Callable[..., Tensor]) -> None:
    """Make the adapter a child of the norm, with its hook; it keeps the handles of what was registered for it."""
    device = next(norm.parameters()).device
    adapter = adapter.to_empty(device=device) if device.type == "meta" else adapter.to(device)
    norm.add_module(CHILD, adapter.to(dtype).train(norm.training))
    adapter.hooks = [norm.register_forward_hook(hook)]


def detach(norm: Any) -> None:
    """Take the adapter of a norm away, with everything that was registered for it."""
    for handle in norm.adapter.hooks:
        handle.remove()
    delattr(norm, CHILD)


# Forward hooks: functions of the module, so that a copy of the model has hooks of its own.


def _adapt_by_modality(norm: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return norm.adapter.adapt(output)


def _adapt_by_token(norm: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Every token of every picture is routed by itself, which is what the original does for a picture alone."""
    return norm.adapter(output, norm.adapter.route(output))


def _adapt(norm: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return norm.adapter(output)


def _take_routing(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Tell the adapters of a layer what it was called with; runs again when a checkpointed layer is recomputed."""
    source = kwargs.pop(ROUTING, None)
    _PRESENT.sources = {
        adapter: source if source is None or isinstance(source, list) else source.of(number)
        for number, adapter in enumerate(adapters(layer))
    }
    return args, kwargs


def _drop_routing(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Nothing is left behind, whatever happened in the layer."""
    _PRESENT.sources = {}


def _add_drop_path(layer: Any, probability: float) -> list[RemovableHandle]:
    """Stochastic depth on both residual branches of a decoder layer; returns the handles of the hooks.

    Raises:
        ValueError: the layer has no modules `self_attn` and `mlp`.
    """
    branches = [getattr(layer, name, None) for name in ("self_attn", "mlp")]
    if not all(isinstance(branch, nn.Module) for branch in branches):
        raise ValueError(f"drop_path: a {type(layer).__name__} has no modules 'self_attn' and 'mlp'")
    return [branch.register_forward_hook(partial(_drop_path, probability=probability)) for branch in branches]


def _drop_path(branch: nn.Module, args: tuple[Any, ...], output: Any, probability: float) -> Any:
    """In training, zero for a sample with `probability`, and enlarged for the others so that the mean stays."""
    if not branch.training:
        return output
    first = output[0] if isinstance(output, tuple) else output  # (B, L, D)
    kept = torch.rand(len(first), 1, 1, device=first.device) >= probability
    dropped = first * (kept / (1 - probability)).to(first.dtype)
    return (dropped, *output[1:]) if isinstance(output, tuple) else dropped


def added_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that `attach` added, by their name in `model`: exactly these are trained and saved."""
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    embedding = getattr(decoder, EMBEDDING, None)
    for prefix, module in model.named_modules():
        if isinstance(module, RepAdapter) or module is embedding:
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter
