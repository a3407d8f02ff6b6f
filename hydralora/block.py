"""A gated MLP whose three linear layers carry routed experts, in place: `adapt` turns it into a block, `release` back.

A block is an instance of a subclass of the MLP's own class, so its modules, parameters and state-dict keys stay where
they are. Its `forward` routes, and then runs the `forward` of that class on a `BlockCall`: the MLP as seen during one
call, whose three linear layers have the weights of the experts as an argument. So whatever else the MLP does, a norm, a
multiplier, a clamp, stays, and nothing is left for a later call. Imports torch alone.

Shape letters: B batch, L sequence length, D width, M width inside the MLP, r rank, E experts.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hydralora.layer import RoutedModule, Routing, one_hot_argmax, routing_of, shared_code, weighted_experts

KINDS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
"""The linear layers of a gated MLP by their name in it, and what stands for each in the names of A and B."""

SETTINGS = ("experts", "rank", "alpha", "dropout", "dense", "observers")
"""Attributes of a block that an MLP may have too, with another meaning."""


class GatedMLP(nn.Module):
    """What a `RoutedMLP` made of three linear layers computes without its experts: the MLP of Llama."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) for `x` (..., D)."""
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return output


class BlockPass(NamedTuple):
    """What a block hands to its three linear layers in one call.

    Attributes:
        x: (..., D), what the block was called with.
        wide: the same in the dtype of the added parameters.
        weights: (..., E) weight of each expert for each token, float32.
    """

    x: Tensor
    wide: Tensor
    weights: Tensor


class BlockCall:
    """A block as the `forward` of its MLP's class sees it during one call; comes in front of that class.

    `gate_proj`, `up_proj` and `down_proj` are functions that hold what the block hands to them; everything else is the
    block's, and the methods are those of the class. What is set on the object ends with the call.

    Args:
        block: the block.
        handed: to its linear layers.
    """

    def __init__(self, block: RoutedMLP, handed: BlockPass) -> None:
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "training", block.training)  # to the compiler a module without it is in training
        for name in KINDS:
            object.__setattr__(self, name, functools.partial(block.project, handed, name))

    def __getattr__(self, name: str) -> Any:
        block = self._block
        return block.hidden[name] if name in block.hidden else getattr(block, name)

    __setattr__ = object.__setattr__


class RoutedMLP(RoutedModule, nn.Module):
    """Gated MLP whose three frozen projections carry routed low-rank experts; a base of every class that `adapt` makes.

    Constructed by itself it is the MLP of Llama; the given projections become children under the names they have
    there. Added parameters, all in `dtype`: `shared_A_gate` and `shared_A_up` (r, D), `shared_A_down` (r, M),
    `experts_B_gate` and `experts_B_up` (E, M, r), `experts_B_down` (E, D, r), and the linear layer `router` (D -> E).

    In dense mode the experts are weighted with the router's probabilities; in sparse mode the most probable expert
    alone acts, with weight 1, so the output gives the router no gradient and only the balance loss trains it.

    Args:
        gate_proj: D -> M; like the other two any `nn.Linear`, quantised ones included.
        up_proj: D -> M.
        down_proj: M -> D.
        act_fn: activation after the gate.
        experts: number of experts E.
        rank: rank r of the experts.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input of A in training. One mask per projection serves all experts.
        dense: weight all experts (True) or use the most probable one (False).
        dtype: of the added parameters; float32 beside a half-precision base trains more precisely.

    Attributes:
        base_class: class of the MLP without experts.
        call_class: of what its `forward` runs on.
        input_name: name of the first argument of its `forward`.
        hidden: attributes of the MLP under a name of `SETTINGS`.
    """

    base_class: ClassVar[type[nn.Module]] = GatedMLP
    call_class: ClassVar[type[Any]]
    input_name: ClassVar[str] = "x"
    hidden: dict[str, Any]
    rank: int
    alpha: float
    dropout: float
    dense: bool
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(
        self,
        gate_proj: nn.Linear,
        up_proj: nn.Linear,
        down_proj: nn.Linear,
        act_fn: Callable[[Tensor], Tensor],
        *,
        experts: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dense: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn
        self.add_experts(experts=experts, rank=rank, alpha=alpha, dropout=dropout, dense=dense, dtype=dtype)

    def add_experts(
        self, *, experts: int, rank: int, alpha: float, dropout: float, dense: bool, dtype: torch.dtype
    ) -> None:
        """Put settings and parameters into a module that has the three linear layers; arguments as of the class."""
        settings = {"experts": experts, "rank": rank, "alpha": alpha, "dropout": dropout, "dense": dense}
        self.hidden = {name: getattr(self, name) for name in SETTINGS if hasattr(self, name)}
        # Not by `setattr`: a child module of that name stays a child, and the settings go in front of it.
        vars(self).update(settings, observers=[])

        device = self.gate_proj.weight.device
        width, inner = self.gate_proj.in_features, self.gate_proj.out_features  # D, M

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.shared_A_gate, self.experts_B_gate = empty(rank, width), empty(experts, inner, rank)
        self.shared_A_up, self.experts_B_up = empty(rank, width), empty(experts, inner, rank)
        self.shared_A_down, self.experts_B_down = empty(rank, inner), empty(experts, width, rank)
        self.router = nn.Linear(width, experts, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self, identity: bool = True) -> None:
        """Draw initial values: A uniform in +-1/sqrt(fan_in) (Kaiming with a = sqrt 5), the router as `nn.Linear`.

        Args:
            identity: B = 0, so that the block starts as the base MLP. False draws B like A: tests need a block
                whose experts act and differ.
        """
        for matrix in (self.shared_A_gate, self.shared_A_up, self.shared_A_down):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        for stacked in (self.experts_B_gate, self.experts_B_up, self.experts_B_down):
            if identity:
                nn.init.zeros_(stacked)
            else:
                nn.init.uniform_(stacked, -1 / math.sqrt(self.rank), 1 / math.sqrt(self.rank))
        self.router.reset_parameters()

    def added_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that is trained, by name; what the MLP has without experts is not among it."""
        for kind in KINDS.values():
            yield from ((name, getattr(self, name)) for name in (f"shared_A_{kind}", f"experts_B_{kind}"))
        yield from ((f"router.{name}", parameter) for name, parameter in self.router.named_parameters())

    def trained_matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        """The router (E, D), and B of the three projections."""
        return [self.router.weight], [getattr(self, f"experts_B_{kind}") for kind in KINDS.values()]

    def route(self, x: Tensor) -> Routing:
        """Routing of tokens `x` (..., D), computed in the router's dtype with a float32 softmax."""
        logits = self.router(x.to(self.router.weight.dtype))  # (..., E)
        return routing_of(torch.softmax(logits, dim=-1, dtype=torch.float32))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the MLP, (..., D) for its first argument (..., D), in the dtype that it has without experts.

        All three projections use the routing of that argument, the down projection too.
        """
        handed = self.begin(args[0] if args else kwargs[self.input_name])
        return self.base_class.forward(self.call_class(self, handed), *args, **kwargs)

    def begin(self, x: Tensor) -> BlockPass:
        """Route `x` (..., D) and tell the observers."""
        wide = x.to(self.router.weight.dtype)  # one copy for the router and two projections
        routing = self.route(wide)
        for observe in self.observers:
            observe(routing)
        weights = routing.probabilities if self.dense else one_hot_argmax(routing.probabilities)  # (..., E)
        return BlockPass(x, wide, weights)

    def project(self, handed: BlockPass, name: str, x: Tensor) -> Tensor:
        """`W0 x + s * sum_e weights_e B_e A x` of the projection `name`, in the dtype of `W0 x`."""
        output: Tensor = getattr(self, name)(x)
        kind = KINDS[name]
        shared_a, experts_b = getattr(self, f"shared_A_{kind}"), getattr(self, f"experts_B_{kind}")
        wide = handed.wide if x is handed.x else x.to(shared_a.dtype)
        dropout = self.dropout if self.training else 0.0
        code = shared_code(wide, shared_a, dropout)  # (..., r)
        return weighted_experts(code, experts_b, handed.weights, self.alpha / self.rank, onto=output)

    def extra_repr(self) -> str:
        """What `print(model)` shows beside the children."""
        mode = "dense" if self.dense else "sparse"
        return f"experts={self.experts}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, {mode}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the MLP's class, from which the reader makes this one again."""
        reduced = super().__reduce_ex__(protocol)
        return reduced if type(self) is RoutedMLP else (_empty, (self.base_class,), *tuple(reduced)[2:])


def problem(mlp: nn.Module) -> str | None:
    """Why a gated MLP cannot become a block, or None."""
    kind = type(mlp)
    own = {name for name, _ in mlp.named_parameters()} | {name for name, _ in mlp.named_children()}
    added = {f"{part}_{kind}" for part in ("shared_A", "experts_B") for kind in KINDS.values()} | {"router"}
    if taken := sorted(added & own):
        return f"a {kind.__name__} has {taken} of its own, and a block would store its parameters under these names"
    if "forward" in vars(mlp) and not _bound(mlp, kind):
        return f"'forward' of this {kind.__name__} was replaced in the object; attach the blocks before that"
    return None


def adapt(mlp: nn.Module, **settings: Any) -> RoutedMLP:
    """Make a gated MLP without `problem` a block, in place; its projections keep their `requires_grad`.

    Args:
        mlp: with the linear layers of `KINDS`.
        settings: the keyword arguments of `RoutedMLP`.
    """
    kind: Any = type(mlp)
    block: Any = mlp
    _become(block, adapted_class(kind))
    block.add_experts(**settings)
    block.router.train(block.training)
    return block


def release(block: RoutedMLP) -> None:
    """Take the experts out of a block that `adapt` made, and give it its own class back."""
    for name in [name for name, _ in block.added_parameters() if "." not in name]:
        delattr(block, name)
    del block.router
    of_base, attributes = block.hidden, vars(block)
    for name in (*SETTINGS, "hidden"):
        del attributes[name]
    _become(block, block.base_class)
    attributes.update({name: value for name, value in of_base.items() if not hasattr(block, name)})


@functools.cache
def adapted_class(base: Any) -> Any:
    """The class of blocks of a class; of the same name, by which others choose what to wrap or to split."""
    own: dict[str, Any] = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    classes = {"base_class": base, "call_class": type(base.__name__, (BlockCall, base), own)}
    first = list(inspect.signature(base.forward).parameters)[1]
    return type(base.__name__, (RoutedMLP, base), {**own, **classes, "input_name": first})


RoutedMLP.call_class = adapted_class(GatedMLP).call_class


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a module, also for programs that keep its bound `forward` in the object.

    accelerate does, where it places the layers of a model on several devices.
    """
    held = _bound(module, type(module))
    module.__class__ = kind
    for name in held:
        vars(module)[name] = types.MethodType(kind.forward, module)


def _bound(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Attributes of the object that are the `forward` of class `kind`, bound to it."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is kind.forward
    ]


def _empty(base: Any) -> Any:
    kind = adapted_class(base)
    return kind.__new__(kind)
