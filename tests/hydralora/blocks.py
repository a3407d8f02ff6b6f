"""Small routed blocks for tests, and the original's tensor names on them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hydralora.block import RoutedMLP


def make_block(
    width: int = 8,
    inner: int = 12,
    experts: int = 3,
    rank: int = 4,
    *,
    alpha: float = 8.0,
    dense: bool = True,
    dropout: float = 0.0,
    identity: bool = False,
) -> RoutedMLP:
    """A block over random frozen projections without bias; its experts act unless `identity`."""
    torch.manual_seed(11)
    gate, up, down = (
        nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        for inputs, outputs in ((width, inner), (width, inner), (inner, width))
    )
    block = RoutedMLP(gate, up, down, nn.SiLU(), experts=experts, rank=rank, alpha=alpha, dropout=dropout, dense=dense)
    block.reset_parameters(identity=identity)
    return block


def set_original_weights(block: RoutedMLP, tensors: Mapping[str, Tensor]) -> None:
    """Fill `block` from the `w/` tensors of a golden block case, written out here independently of `original.py`."""
    state = {name: tensors[f"w/original_module.{name}"] for name in ("gate_proj.weight", "up_proj.weight")}
    state["down_proj.weight"] = tensors["w/original_module.down_proj.weight"]
    for kind in ("gate", "up", "down"):
        state[f"shared_A_{kind}"] = tensors[f"w/shared_LoRA_A_{kind}"]
        experts = [tensors[f"w/moe_{kind}.{expert}.LoRA_B"] for expert in range(block.experts)]
        state[f"experts_B_{kind}"] = torch.stack(experts)
    for name in ("router.weight", "router.bias"):
        state[name] = tensors[f"w/{name}"]
    block.load_state_dict(state)


def original_gradients(block: RoutedMLP) -> dict[str, Tensor | None]:
    """Gradients of the added parameters under the original's names, one entry per expert's B."""
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in block.added_parameters():
        if name.startswith("experts_B_"):
            kind = name.removeprefix("experts_B_")
            for expert in range(block.experts):
                gradient = None if parameter.grad is None else parameter.grad[expert]
                gradients[f"moe_{kind}.{expert}.LoRA_B"] = gradient
        else:
            gradients[name.replace("shared_A_", "shared_LoRA_A_")] = parameter.grad
    return gradients
