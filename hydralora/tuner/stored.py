"""The names and shapes of a stored adapter, today's and those of earlier versions.

Today's are LoRA's: `lora_A.weight` (r, in_features), `lora_B.weight` (out_features, E * r) and, for several experts,
`lora_router.weight` (E, in_features). Versions before wrote `hydralora_A`, `hydralora_B` (E, out_features, r) and
`hydralora_router`, one expert's included, as the original does.

Shape letters: r rank, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hydralora.layer import side_by_side

A, B, ROUTER = "lora_A.weight", "lora_B.weight", "lora_router.weight"
"""Names of the tensors of a layer, after the layer's own."""

_EARLIER = {"hydralora_A": A, "hydralora_B": B, "hydralora_router": ROUTER}


def split_name(name: str) -> tuple[str, str]:
    """Name of the layer and of its tensor (`A`, `B`, `ROUTER`, or one of something else) in the name in a file."""
    head, _, last = name.rpartition(".")
    layer, _, part = head.rpartition(".")
    return layer, f"{part}.{last}"


def from_earlier(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under today's names and in today's shapes; those that are so already are taken over as they are."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part not in _EARLIER:
            renamed[name] = tensor
            continue
        shared_a = tensors.get(f"{layer}.hydralora_A")
        # A wrong shape stays as it is, for whoever checks shapes.
        stacked = part == "hydralora_B" and tensor.dim() == 3 and shared_a is not None
        fits = stacked and shared_a.shape[:1] == tensor.shape[2:]
        renamed[f"{layer}.{_EARLIER[part]}"] = side_by_side(tensor).contiguous() if fits else tensor
    return renamed


def without_lone_routers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by today's names, without the routers of one expert: their softmax is 1 whatever they hold."""
    return {
        name: tensor for name, tensor in tensors.items() if split_name(name)[1] != ROUTER or tensor.shape[:1] != (1,)
    }
