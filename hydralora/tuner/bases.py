"""Which frozen layers HydraLoRA adapts, told by class and content; the others are refused with the reason.

Adapted is what computes `y = W x + b` of hidden states: `torch.nn.Linear`, those of quantization libraries, and the
`Conv1D` of GPT-2, whose weight is stored transposed, (in_features, out_features).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hydralora.split import is_split

_UNCALLED = (
    "it reads the weights of its projections and never calls them, so an adapter on them would have no effect. "
    "Use PEFT's LoRA there, or leave it out by exclude_modules"
)
_NO_STATE = (
    "its input is a token's number, not a hidden state, and a router has nothing to read there. Name it in "
    "modules_to_save to train it in full, or the new tokens alone in trainable_token_indices"
)
_PATCHES = (
    "it computes each position from a patch of several, and the method weights the experts by one hidden state. "
    "Use PEFT's LoRA there, or name it in modules_to_save"
)
_REASONS: list[tuple[tuple[type[nn.Module], ...], str]] = [
    ((nn.Embedding, nn.EmbeddingBag), _NO_STATE),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _PATCHES),
    ((nn.MultiheadAttention,), _UNCALLED),
]


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is stored as (in_features, out_features)."""
    return isinstance(layer, Conv1D)


def features(layer: nn.Module) -> tuple[int, int]:
    """Numbers of inputs and outputs, (in_features, out_features), of a layer that `refusal` lets pass."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features


def in_stored_form(layer: nn.Module, weight: Tensor) -> Tensor:
    """A matrix (out_features, in_features) in the shape of the layer's own weight."""
    return weight.T if is_transposed(layer) else weight


def quantization(layer: nn.Module) -> Any:
    """PEFT's way of reading and writing the weight of a quantised layer; None: it is not quantised, or unknown."""
    backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=_no_tensor_subclass)
    if backend is not None and backend.backend_name == "torchao":
        backend.supports_merge = False  # how to quantise again is known to the model's configuration alone
    return backend


def _no_tensor_subclass() -> Any:
    raise ValueError("a weight of torchao cannot be merged into; load the base without quantization to merge")


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer keeps its matrix as packed integers, as those of GPTQ and AWQ do: it has no weight to add to."""
    if not all(isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features")):
        return False
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return any(tensor.dim() >= 2 and not tensor.is_floating_point() for tensor in own)


def refusal(layer: nn.Module, parent: nn.Module) -> str | None:
    """Why a layer cannot be adapted, and what to do instead; None: it can.

    Args:
        layer: the frozen layer.
        parent: the module that it is a child of.
    """
    name = type(layer).__name__
    if isinstance(parent, nn.MultiheadAttention):
        return f"is a {name} of {type(parent).__name__}; {_UNCALLED}"
    for classes, reason in _REASONS:
        if isinstance(layer, classes):
            return f"is a {name}; {reason}"
    if isinstance(layer, nn.Linear | Conv1D) or is_packed(layer) or quantization(layer) is not None:
        return None
    return (
        f"is a {name}; HydraLoRA adapts linear layers: torch.nn.Linear, its quantised forms and the Conv1D of "
        "transformers. Choose other target_modules, or leave it out by exclude_modules"
    )


def merge_refusal(layer: nn.Module) -> str | None:
    """Why nothing can be added to the weight of an adapted layer; None: it can."""
    backend = quantization(layer)
    cannot = is_packed(layer) and not hasattr(layer, "weight") if backend is None else not backend.supports_merge
    if not cannot:
        return None
    return (
        f"{type(layer).__name__} keeps its weight packed, and the sum could not be packed again. Merge into the base "
        "as it was before quantization, or serve the adapter unmerged"
    )


def refuse_merging(model: nn.Module, layers: Mapping[str, BaseTunerLayer]) -> None:
    """Stop if an adapter cannot be added to the weights of some layers, before any of them is touched.

    Args:
        model: the whole model, whose other modules may share a weight.
        layers: adapted layers, by name.

    Raises:
        ValueError: a weight is packed, split over processes, or that of another module too, as of an output layer
            that is tied to the embedding.
    """
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        reason = merge_refusal(base)
        flat = any(weight.ndim < 2 for _, weight in layer.added_parameters())  # a share of FSDP1
        if flat or any(is_split(weight) for weight in layer.parameters()):
            reason = "weights are split over processes. Save the adapter whole, and merge it into a base in one process"
        shared = names.get(id(getattr(base, "weight", None)), [])
        if reason is None and len(shared) > 1:
            reason = f"its weight is shared ({', '.join(shared)}), and the adapter changes this layer alone. Untie them"
        if reason is not None:
            raise ValueError(f"the adapter of '{name}' cannot be merged: {reason}.")
