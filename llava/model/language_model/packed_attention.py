"""Attention in rows of several samples: each token sees what is in front of it in its own sample.

On CUDA the kernels for sequences of different lengths take the bounds of the samples (torch's `varlen_attn`, else that
of flash-attn); everywhere else a block-diagonal mask does the same. Which of them is decided for each pass, by device,
dtype and sizes.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from llava.errors import FlagError
from llava.model.language_model.masks import layer_kinds
from llava.segments import PackedRows

NAME = "packed_sdpa"
"""What `attn_implementation` calls it: transformers' "sdpa", and the kernels below where bounds are passed on."""

BOUNDED = ("flash_attention_2", "flash_attention_3")
"""Attention of transformers that takes bounds by itself."""

PACKABLE = ("sdpa", "eager", *BOUNDED)
"""Values of `--attn_implementation` under which samples of a row are kept apart."""

Kernel = Callable[..., Tensor]
"""Takes query (n, H, C), key and value (n, K, C) of all positions, bounds, longest, scale and window."""


def register() -> str:
    """Make it known to transformers under `NAME`, which is returned. May be called again."""
    AttentionInterface.register(NAME, packed_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def use_packed_attention(model: Any) -> None:
    """Let a model with torch's attention take the kernels for packed rows where they run; others stay as they are."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(register())


# What a pass needs


def packed_masks(config: Any, hidden: Tensor, packed: PackedRows) -> tuple[dict[str, Any], dict[str, Any]]:
    """Masks by the kind of layer, and what the layers' attention is to be called with.

    Args:
        config: of the decoder.
        hidden: (B, L, D), what enters the first layer.
        packed: where the samples are.

    Returns:
        Masks (B, 1, L, L) and nothing, or None as masks and the bounds of the samples under transformers' names.

    Raises:
        FlagError: the attention of the model does neither.
    """
    kinds = list(dict.fromkeys(layer_kinds(config)))
    chosen = config._attn_implementation
    if chosen in BOUNDED or (chosen == NAME and packed_kernel(config, hidden.device, _computed(hidden)) is not None):
        ends = {"cu_seq_lens_q": packed.bounds, "cu_seq_lens_k": packed.bounds}
        return dict.fromkeys(kinds), {**ends, "max_length_q": packed.longest, "max_length_k": packed.longest}
    form = AttentionMaskInterface().get(chosen)
    if form not in (sdpa_mask, eager_mask):
        raise FlagError(
            f"--packing True: the attention '{chosen}' does not keep the samples of a row apart; use one of "
            f"{', '.join(PACKABLE)}"
        )
    return {kind: _block_mask(config, kind, packed.samples, hidden.dtype, form is eager_mask) for kind in kinds}, {}


def _block_mask(config: Any, kind: str, samples: Tensor, dtype: torch.dtype, additive: bool) -> Tensor:
    """(B, 1, L, L): True, or 0, where a token of `samples` (B, L) may look; padding sees padding, no row is empty."""
    length = samples.shape[1]
    places = torch.arange(length, device=samples.device)
    distance = places[:, None] - places[None, :]  # (L, L)
    near = distance >= 0
    if kind == "sliding_attention":
        near = near & (distance < config.sliding_window)
    seen = (near & (samples[:, :, None] == samples[:, None, :]))[:, None]  # (B, 1, L, L)
    if not additive:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


# The kernels


def packed_kernel(config: Any, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The kernel that takes bounds; None where a mask has to do: outside of CUDA, in float32, for sizes it lacks.

    Args:
        config: of the decoder.
        device: of the hidden states.
        dtype: that attention is computed in.
    """
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fits = width % 8 == 0 and width <= 256 and not getattr(config, "attention_dropout", 0.0)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or not fits or torch.version.hip:
        return None
    # A GPU that is only planned for is a new one.
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 8:
        return None
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return torch_kernel
    return flash_attn_kernel if importlib.util.find_spec("flash_attn") is not None else None


def torch_kernel(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: int) -> Tensor:
    """Torch's `varlen_attn`; see `Kernel`."""
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:  # torch 2.11
            groups = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found: Tensor = varlen_attn(
            q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(window, 0), **grouped
        )
    return found


def flash_attn_kernel(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    """That of flash-attn, for a torch without `varlen_attn`; see `Kernel`."""
    from flash_attn import flash_attn_varlen_func

    found: Tensor = flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True, window_size=(window, 0)
    )
    return found


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of a decoder layer, called by transformers.

    Args:
        module: the attention layer.
        query: (B, H, L, C).
        key: (B, K, L, C); K divides H.
        value: (B, K, L, C).
        attention_mask: what "sdpa" takes; None with bounds.
        dropout: only without bounds.
        scaling: factor on the scores; None: one over the root of C.
        sliding_window: positions that a token sees, its own included; None: all.
        cu_seq_lens_q: (sequences + 1,) int32, the bounds of the samples in the flattened (B L); None: plain "sdpa".
        max_length_q: the longest of the sequences.
        kwargs: other arguments of the layer; they go to "sdpa".

    Returns:
        (B, L, H, C), and None in place of the probabilities.

    Raises:
        FlagError: bounds were given where no kernel takes them.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    dtype = _computed(query)
    kernel = packed_kernel(module.config, query.device, dtype)
    if kernel is None:
        raise FlagError(f"--packing True: no kernel takes packed rows in {dtype} on {query.device}")
    batch, heads, length, width = query.shape
    flat = [x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value)]  # (B * L, H or K, C)
    scale = width**-0.5 if scaling is None else scaling
    # Kernels count the positions in front of the token's own; -1: all.
    window = -1 if sliding_window is None else sliding_window - 1
    output = kernel(*flat, cu_seq_lens_q, max_length_q, scale, window)
    return output.view(batch, length, heads, width), None


def _computed(x: Tensor) -> torch.dtype:
    """The dtype that torch's own attention would compute in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
