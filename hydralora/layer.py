"""The mathematics of HydraLoRA: shared A, experts B, and a router per linear layer or per MLP block.

HydraLoRA (Tian et al., NeurIPS 2024, arXiv 2404.19245, section 3) adapts a frozen projection W0 with one matrix A that
all experts share and one matrix B_i per expert, weighted by a router:

    y = W0 x + s * sum_i w_i B_i A x,        w = softmax(W_g x),        s = alpha / rank

`RoutedUpdate` is what this adds to the output of one layer. MLLM-HydraLoRA (`moe.py` of its repository) puts it on the
gate, up and down projection of a gated MLP and routes once per block, from the input of the block (`block.py`).
Needs torch >= 2.1 and nothing else.

Shape letters: B batch, L sequence length, r rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing:
    """How one block distributed its tokens.

    Args:
        probabilities: (..., E) float32, the weights that act: the softmax of the router, if nothing else decides.
        choice: as the attribute; None: it is computed whenever somebody reads it.
        router: (..., E) float32, softmax of the router where something else decides (the best k of it, a whole
            sequence, the caller); None: it is `probabilities`.

    Attributes:
        given_choice: the argument `choice`.
    """

    __slots__ = ("given_choice", "probabilities", "router")

    def __init__(self, probabilities: Tensor, choice: Tensor | None = None, router: Tensor | None = None) -> None:
        self.probabilities, self.given_choice, self.router = probabilities, choice, router

    @property
    def choice(self) -> Tensor:
        """(..., E) float32, one-hot of the expert of the largest weight in value.

        In backward its gradient is that of `probabilities` (straight-through estimator).
        """
        if self.given_choice is not None:
            return self.given_choice
        return one_hot_argmax(self.probabilities) - self.probabilities.detach() + self.probabilities

    def map(self, function: Callable[[Tensor], Tensor]) -> Routing:
        """The routing whose tensors are those of this one after `function`."""
        others = (None if values is None else function(values) for values in (self.given_choice, self.router))
        return Routing(function(self.probabilities), *others)

    @property
    def learned(self) -> Tensor:
        """(..., E) float32, softmax of the router, through which a loss on the routing reaches it."""
        return self.probabilities if self.router is None else self.router


class RoutedModule:
    """Mixin of every layer with a router.

    Attributes:
        observers: called with the `Routing` of every forward pass, recomputation under gradient checkpointing included.
        experts: number of experts E.
    """

    experts: int
    observers: list[Callable[[Routing], None]]

    added_parameters: Callable[..., Iterator[tuple[str, nn.Parameter]]]
    """A method: everything that is trained, by name."""

    trained_matrices: Callable[..., tuple[list[Tensor], list[Tensor]]]
    """A method: the routers (E, in_features), and all B (E, out_features, r), that are trained."""


def one_hot_argmax(probabilities: Tensor) -> Tensor:
    """One-hot code of the largest entry along the last dimension, without gradient; same shape and dtype."""
    best = probabilities.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, best, 1.0)


def routing_of(probabilities: Tensor, router: Tensor | None = None) -> Routing:
    """The routing of `probabilities` (..., E), by which the experts act, with what the router says if it differs."""
    return Routing(probabilities, None, router)


@torch.no_grad()
def stacked_choices(routings: Sequence[Routing], probabilities: Tensor | None = None) -> Tensor:
    """The choices of layers with equally many tokens and experts, (layers, ..., E) without gradient.

    Args:
        routings: of each layer, on any device; the result is on that of the first one.
        probabilities: theirs, stacked, if somebody has stacked them.
    """
    if any(routing.given_choice is not None for routing in routings):
        return stacked([routing.choice for routing in routings])
    if probabilities is None:
        probabilities = stacked([routing.probabilities for routing in routings])
    return one_hot_argmax(probabilities)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape in one, on the device of the first one, where a model that is spread over devices meets."""
    device = tensors[0].device
    return torch.stack([tensor if tensor.device == device else tensor.to(device) for tensor in tensors])


def _weighted_code(code: Tensor, weights: Tensor) -> Tensor:
    """Code (..., r) scaled by the weights (..., E) of all experts: (..., E * r) in the dtype of `code`."""
    rows = (weights.unsqueeze(-1) * code.unsqueeze(-2)).flatten(-2)
    return rows if rows.dtype == code.dtype else rows.to(code.dtype)


def side_by_side(experts_b: Tensor) -> Tensor:
    """All B of a projection in one matrix: (out_features, E * r) of (E, out_features, r), or of itself."""
    return experts_b if experts_b.dim() == 2 else experts_b.transpose(0, 1).flatten(1)


def in_forward_mode() -> bool:
    """Whether derivatives are taken in forward mode here, as by `torch.func.jvp`."""
    level: int = torch.autograd.forward_ad._current_level
    return level >= 0


class _WeightedExperts(torch.autograd.Function):
    """`onto + scaling * sum_e weights_e * B_e code`, with nothing but code, weights and B kept for backward.

    Autograd by itself would also keep the scaled weights, the weighted code and the stacked copy of B, which for a
    wide layer is larger than all that depends on the tokens. Backward builds them again from the inputs. Made of
    operations that `torch.vmap` knows, so `torch.func` transforms it. A rule for forward mode (`jvp`) would keep
    `torch.compile` from tracing the layer; in that mode autograd differentiates the operations themselves. `onto` is
    (B * T, out_features).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(code: Tensor, weights: Tensor, experts_b: Tensor, scaling: float, onto: Tensor | None) -> Tensor:
        rows, matrix = _weighted_code(code, weights * scaling), side_by_side(experts_b)
        if onto is None:
            return F.linear(rows, matrix)
        return torch.addmm(onto, rows.reshape(-1, matrix.shape[1]), matrix.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        code, weights, experts_b, ctx.scaling, _ = inputs
        ctx.save_for_backward(code, weights, experts_b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]  # (..., out_features), flat if `onto` is
        code, weights, experts_b = ctx.saved_tensors
        scaled = weights * ctx.scaling
        experts, rank = weights.shape[-1], code.shape[-1]
        for_code = for_weights = for_b = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            back = (gradient @ side_by_side(experts_b)).to(weights.dtype).reshape(*code.shape[:-1], experts, rank)
            for_code = (back * scaled.unsqueeze(-1)).sum(-2).to(code.dtype)  # (..., r)
            if ctx.needs_input_grad[1]:
                # Weights of whole sequences, (B, 1, E), collect the gradients of all their tokens.
                for_weights = (back * code.unsqueeze(-2)).sum(-1).mul(ctx.scaling).sum_to_size(weights.shape)
        if ctx.needs_input_grad[2]:
            rows = _weighted_code(code, scaled).reshape(-1, experts * rank)
            stacked = gradient.reshape(-1, gradient.shape[-1]).T @ rows  # (out_features, E * r)
            # (out_features, E * r), or (E, out_features, r)
            for_b = stacked if experts_b.dim() == 2 else stacked.view(-1, experts, rank).transpose(0, 1)
        return for_code, for_weights, for_b, None, gradient if ctx.needs_input_grad[4] else None


class _DroppedLinear(torch.autograd.Function):
    """`weight @ dropout(x)`, with x as it is and one byte for each of its numbers kept for backward.

    The router needs x without dropout, so x is kept anyway; autograd would keep the dropped copy too. `mask` is True
    for a number that is kept.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, mask: Tensor, scaling: float) -> Tensor:
        return F.linear(torch.where(mask, x, 0.0), weight) * scaling  # (..., r): scaled where it is small

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, mask, ctx.scaling = inputs
        ctx.save_for_backward(x, weight, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        gradient = gradients[0] * ctx.scaling  # (..., r), under autocast in its dtype
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = torch.where(mask, gradient @ weight.to(gradient.dtype), 0.0).to(x.dtype)
        if ctx.needs_input_grad[1]:
            kept = torch.where(mask, x, 0.0).to(gradient.dtype).reshape(-1, x.shape[-1])
            for_weight = (gradient.reshape(-1, len(weight)).T @ kept).to(weight.dtype)
        return for_x, for_weight, None, None


def shared_code(x: Tensor, shared_a: Tensor, dropout: float = 0.0) -> Tensor:
    """`A dropout(x)`, (..., r) in the dtype of `shared_a` or of autocast; x and the mask of its dropout are kept.

    Args:
        x: (..., in_features), in the dtype of `shared_a`.
        shared_a: (r, in_features).
        dropout: probability of dropping a number of x, below 1; one mask serves all experts. 0 in evaluation.
    """
    if not dropout:
        return F.linear(x, shared_a)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
    function = _DroppedLinear.forward if in_forward_mode() else _DroppedLinear.apply
    return function(x, shared_a, mask, 1 / (1 - dropout))


def _without_gradient(code: Tensor, experts_b: Tensor, weights: Tensor) -> Tensor:
    """`sum_e weights_e * B_e code`, (..., out_features), where no gradient is wanted; faster for a single token."""
    if code.numel() != code.shape[-1] or code.shape[:-1] != weights.shape[:-1] or code.dtype != weights.dtype:
        return F.linear(_weighted_code(code, weights), side_by_side(experts_b))
    if experts_b.dim() == 2:
        return F.linear(torch.kron(weights, code), experts_b)  # the same numbers as of `_weighted_code`
    # One B for this token costs less than a copy of all of them, side by side.
    mixed = weights.reshape(1, -1) @ experts_b.flatten(1)  # (1, out_features * r)
    return F.linear(code, mixed.view(experts_b.shape[1:]))


def weighted_experts(
    code: Tensor, experts_b: Tensor, weights: Tensor, scaling: float = 1.0, onto: Tensor | None = None
) -> Tensor:
    """`onto + scaling * sum_e weights_e * B_e code` as one matrix product, whatever the number of experts.

    The weights scale the r-dimensional code, giving (..., E * r) numbers that one product with the B side by side
    turns into the sum; no tensor is larger than the input or the output by a factor of E. Code and weights are kept.

    Args:
        code: (..., r).
        experts_b: (out_features, E * r), column e * r + k is column k of B_e; or (E, out_features, r).
        weights: (..., E) weight of each expert for each token, float32; (B, 1, E) for whole sequences.
        scaling: factor of the sum, alpha / rank.
        onto: (..., out_features), what the sum is added to; in the dtype of `code` the product itself adds it.

    Returns:
        (..., out_features) in the dtype of `onto`, or of `code`.
    """
    if onto is not None and onto.dtype != code.dtype:
        return onto + weighted_experts(code, experts_b, weights, scaling).to(onto.dtype)
    if experts_b.dtype != code.dtype:
        experts_b = experts_b.to(code.dtype)
    if not torch.is_grad_enabled():
        # For one token, an autograd function costs more than its products, and `addmm` more than product and sum.
        update = _without_gradient(code, experts_b, weights)
        if onto is None or isinstance(scaling, Tensor):  # a prepared hot swap keeps it on the device
            return update * scaling if onto is None else onto + update * scaling
        return torch.add(onto, update, alpha=scaling)
    function = _WeightedExperts.forward if in_forward_mode() else _WeightedExperts.apply
    if onto is None:
        return function(code, weights, experts_b, scaling, None)
    # Flat outside of the function: its output must be no view, since some models add to it in place.
    flat = onto.reshape(-1, onto.shape[-1])  # (B * T, out_features)
    return function(code, weights, experts_b, scaling, flat).view(onto.shape)


def routed_low_rank(
    x: Tensor, shared_a: Tensor, experts_b: Tensor, weights: Tensor, scaling: float = 1.0, dropout: float = 0.0
) -> Tensor:
    """`scaling * sum_e weights_e * B_e A dropout(x)`; arguments as of `shared_code` and `weighted_experts`."""
    return weighted_experts(shared_code(x, shared_a, dropout), experts_b, weights, scaling)


class RoutedUpdate(RoutedModule, nn.Module):
    """What HydraLoRA adds to the output of one frozen linear layer, with a router of the layer's own.

    The layer of the paper, and what `hydralora/tuner/linear.py` computes for an adapter of PEFT. Trained, all in
    `dtype`: `shared_A` (r, in_features), `experts_B` (E, out_features, r), `router` (E, in_features).

    Args:
        in_features: of the layer.
        out_features: of the layer.
        experts: number of experts E; with 1 the update is that of LoRA.
        rank: rank r of the experts.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input of A in training. One mask serves all experts.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        experts: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.experts, self.rank, self.alpha, self.dropout = experts, rank, alpha, dropout
        self.observers = []
        self.shared_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.experts_B = nn.Parameter(torch.empty(experts, out_features, rank, device=device, dtype=dtype))
        self.router = nn.Parameter(torch.empty(experts, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, identity: bool = True) -> None:
        """Draw A and router uniform in +-1/sqrt(in_features); B is 0, or drawn too if not `identity` (for tests)."""
        nn.init.kaiming_uniform_(self.shared_A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        bound = 0.0 if identity else 1 / math.sqrt(self.rank)
        nn.init.uniform_(self.experts_B, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """The update, (..., out_features) in the dtype of A x, for `x` (..., in_features) of any dtype."""
        x = x.to(self.shared_A.dtype)
        probabilities = torch.softmax(F.linear(x, self.router), dim=-1, dtype=torch.float32)  # (..., E)
        if self.observers:
            routing = routing_of(probabilities)
            for observe in self.observers:
                observe(routing)
        dropout = self.dropout if self.training else 0.0
        scaling = self.alpha / self.rank
        if self.experts == 1:  # its weight is 1: in exactly LoRA's order of products
            return routed_low_rank(x, self.shared_A, self.experts_B, probabilities, dropout=dropout) * scaling
        return routed_low_rank(x, self.shared_A, self.experts_B, probabilities, scaling, dropout)

    def added_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """A, B and router by name."""
        return self.named_parameters()

    def trained_matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        """The router (E, in_features), and B (E, out_features, r)."""
        return [self.router], [self.experts_B]

    def extra_repr(self) -> str:
        """What `print(model)` shows beside the children."""
        return f"experts={self.experts}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


def expert_balance_loss(
    routings: Sequence[Routing], attention_mask: Tensor | None, texts: tuple[Tensor, int] | None = None
) -> Tensor:
    """Loss that is smallest when every expert gets the same share of tokens.

    With f_e the share of tokens whose most probable expert is e (no gradient) and P_e the mean probability of e, both
    over all blocks and all valid tokens of one sample, the loss is `mean over samples of sum_e f_e P_e`: 1/E when
    balanced, 1 when one expert takes everything. This is the auxiliary loss of Switch Transformer (arXiv 2101.03961,
    equation 4) per sample and without its factor E.

    Args:
        routings: of each block, (B, L, E).
        attention_mask: (B, L), true at valid tokens (images included, padding not); None: all are valid. A sample
            without any valid token contributes 0.
        texts: of rows with several samples the number of the sample at each position, (B, L) int64, and how many
            samples there are; other positions, of padding, have that as their number. None: every row is a sample.

    Returns:
        Scalar float32, not yet weighted. Blocks with different numbers of experts are balanced among those with as
        many; the loss is the mean over all blocks then, those of one expert left out.

    Raises:
        ValueError: mask and routings have different shapes.
    """
    groups = by_experts(routings)
    blocks = sum(len(group) for group in groups)
    losses = [_balance_of_equals(group, attention_mask, texts) * (len(group) / blocks) for group in groups]
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total


def by_experts(routings: Sequence[Routing]) -> list[list[Routing]]:
    """Routings by their number of experts, ascending; where some have several, those of one expert are left out."""
    groups: dict[int, list[Routing]] = {}
    for routing in routings:
        groups.setdefault(routing.probabilities.shape[-1], []).append(routing)
    return [groups[experts] for experts in sorted(groups) if experts > 1 or len(groups) == 1]


def _balance_of_equals(
    routings: Sequence[Routing], attention_mask: Tensor | None, texts: tuple[Tensor, int] | None
) -> Tensor:
    """`expert_balance_loss` of blocks that have equally many experts."""
    B, L, _ = routings[0].probabilities.shape
    device = routings[0].probabilities.device
    valid = torch.ones(B, L, 1, device=device) if attention_mask is None else attention_mask.to(device)[..., None]
    for routing in routings:
        if routing.probabilities.shape[:2] != valid.shape[:2]:
            raise ValueError(
                f"attention mask {tuple(valid.shape[:2])} and routing {tuple(routing.probabilities.shape[:2])} "
                "differ in shape: tokens were dropped between the input and a block"
            )
    # All layers at once: as many operations for any number of them.
    learned = stacked([routing.learned for routing in routings])  # (layers, B, L, E)
    act_by_it = all(routing.router is None for routing in routings)
    chosen = stacked_choices(routings, learned if act_by_it else None)
    if texts is None:
        share, probability = ((values * valid).sum(dim=(0, 2)) for values in (chosen, learned))  # (B, E)
        counted = valid.sum(dim=(1, 2))  # (B,)
    else:
        share, probability = (_by_text((values * valid).sum(dim=0), texts) for values in (chosen, learned))
        counted = _by_text(valid.long(), texts)[:, 0]
    tokens = (len(routings) * counted).clamp(min=1)[:, None]  # (B, 1); of samples, where rows have several
    return (share / tokens * (probability / tokens)).sum(dim=-1).mean()


def _by_text(values: Tensor, texts: tuple[Tensor, int]) -> Tensor:
    """The sum (samples, E) of `values` (B, L, E) over each sample; `texts` as of `expert_balance_loss`."""
    numbers, count = texts
    sums = torch.zeros(count + 1, values.shape[-1], dtype=values.dtype, device=values.device)
    return sums.index_add(0, numbers.to(values.device).flatten(), values.flatten(0, 1))[:count]
