"""What is compared: one frozen linear layer or gated MLP, adapted in several ways with the same frozen weights.

`lora` is PEFT's own. `loop` is HydraLoRA written as its authors compute it (Tian et al., NeurIPS 2024; layer of their
fork of PEFT, block of MLLM-HydraLoRA): one expert after the other, each with a product with A, a dropout mask and an
update of full width of its own. It has the very weights of `hydralora`, so the two can be compared number for number.

Shape letters: T tokens, D width, r rank, E experts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from hydralora import HydraLoraConfig, RoutedMLP

ALPHA = 32.0


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        kind: `layer`, one linear layer width -> inner with a router of its own; `token`, the same in evaluation, for
            one token; or `block`, a gated MLP of inner width `inner` with one router.
        width: D, features of the input.
        inner: features of the output of a layer, inner width M of a block.
        experts: E.
        rank: r of HydraLoRA and of `lora`.
        dropout: before A, in training.
    """

    kind: str
    width: int
    inner: int
    experts: int
    rank: int
    dropout: float

    @property
    def outputs(self) -> int:
        """Features of the output."""
        return self.width if self.kind == "block" else self.inner

    def routed_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the routed activations: the router's probabilities, and E * r weighted codes per projection."""
        projections = 3 if self.kind == "block" else 1
        return tokens * self.experts * (torch.float32.itemsize + projections * self.rank * dtype.itemsize)


class FrozenLayer(nn.Module):
    """A frozen linear layer alone; adapters are put on its child."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.projection = nn.Linear(case.width, case.inner, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, outputs) of (T, D)."""
        return self.projection(x)


class FrozenBlock(nn.Module):
    """A frozen gated MLP; adapters are put on its children."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(case.width, case.inner, bias=False)
        self.up_proj = nn.Linear(case.width, case.inner, bias=False)
        self.down_proj = nn.Linear(case.inner, case.width, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) of (T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LoopProjection(nn.Module):
    """A frozen linear layer and its experts, one after the other."""

    def __init__(self, base: nn.Linear, shared_a: Tensor, experts_b: Tensor, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.shared_a = nn.Parameter(shared_a.detach().clone())  # (r, D)
        # (outputs, r) each
        self.experts_b = nn.ParameterList(nn.Parameter(matrix.detach().clone()) for matrix in experts_b)
        self.dropout = dropout
        self.scaling = ALPHA / len(shared_a)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """`W0 x + s * sum_e weights_e B_e A x`, (T, outputs) for x (T, D) and weights (T, E)."""
        y = self.base(x)
        for number, expert in enumerate(self.experts_b):
            update = F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.shared_a), expert)
            y = y + weights[..., number, None] * update * self.scaling
        return y


class LoopLayer(nn.Module):
    """The loop with the weights of a layer of the PEFT method, which has no router for one expert."""

    def __init__(self, adapted: nn.Module, dropout: float) -> None:
        super().__init__()
        self.router = copy.deepcopy(adapted.lora_router["default"]) if "default" in adapted.lora_router else None
        matrices = (adapted.lora_A["default"].weight, adapted.expert_matrices("default"))
        self.projection = LoopProjection(copy.deepcopy(adapted.base_layer), *matrices, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(T, outputs) of (T, D)."""
        weights = x.new_ones(*x.shape[:-1], 1) if self.router is None else self.router(x).to(x.dtype)  # (T, E)
        return self.projection(x, weights)


class LoopBlock(nn.Module):
    """The loop with the weights of a routed MLP block in dense mode."""

    def __init__(self, block: RoutedMLP) -> None:
        super().__init__()
        self.router = copy.deepcopy(block.router)
        bases = (copy.deepcopy(layer) for layer in (block.gate_proj, block.up_proj, block.down_proj))
        shared = (block.shared_A_gate, block.shared_A_up, block.shared_A_down)
        experts = (block.experts_B_gate, block.experts_B_up, block.experts_B_down)
        self.gate, self.up, self.down = (
            LoopProjection(base, a, b, block.dropout) for base, a, b in zip(bases, shared, experts, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) of (T, D)."""
        weights = torch.softmax(self.router(x), dim=-1, dtype=torch.float32).to(x.dtype)  # (T, E)
        return self.down(F.silu(self.gate(x, weights)) * self.up(x, weights), weights)


def trained_parameters(module: nn.Module) -> int:
    """Number of parameters with a gradient."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _injected(frozen: nn.Module, config: PeftConfig) -> nn.Module:
    config.target_modules = {name for name, _ in frozen.named_children()}
    return inject_adapter_in_model(config, copy.deepcopy(frozen))


def _lora(frozen: nn.Module, rank: int, dropout: float) -> nn.Module:
    options = {"lora_alpha": ALPHA, "lora_dropout": dropout, "init_lora_weights": False}
    return _injected(frozen, LoraConfig(r=rank, **options))


def _routed_block(frozen: nn.Module, case: Case, dense: bool) -> RoutedMLP:
    projections = copy.deepcopy(frozen)
    settings = {"experts": case.experts, "rank": case.rank, "alpha": ALPHA, "dropout": case.dropout}
    block = RoutedMLP(
        projections.gate_proj, projections.up_proj, projections.down_proj, nn.SiLU(), dense=dense, **settings
    )
    block.reset_parameters(identity=False)
    return block


def build_methods(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The methods of a case by name, every parameter of them in `dtype` on `device`; for tokens in evaluation mode.

    `frozen` has no adapter; `lora` has the rank of the case, `lora_matched` the rank at which its trained parameters
    come nearest to those of `hydralora`. Blocks have `hydralora_sparse` as well. No adapter starts as the identity.
    """
    frozen = FrozenBlock(case) if case.kind == "block" else FrozenLayer(case)
    methods: dict[str, nn.Module] = {"frozen": frozen, "lora": _lora(frozen, case.rank, case.dropout)}
    if case.kind != "block":
        options = {"lora_alpha": ALPHA, "lora_dropout": case.dropout, "init_weights": False}
        ours = _injected(frozen, HydraLoraConfig(r=case.rank, lora_nums=case.experts, **options))
        routed = {"loop": LoopLayer(ours.projection, case.dropout), "hydralora": ours}
    else:
        ours = _routed_block(frozen, case, dense=True)
        routed = {"loop": LoopBlock(ours), "hydralora": ours, "hydralora_sparse": _routed_block(frozen, case, False)}
    per_rank = trained_parameters(methods["lora"]) / case.rank
    matched = max(1, round(trained_parameters(ours) / per_rank))
    methods |= {"lora_matched": _lora(frozen, matched, case.dropout)} | routed
    return {name: module.to(device, dtype).train(case.kind != "token") for name, module in methods.items()}
