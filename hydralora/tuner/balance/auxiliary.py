"""Losses on the routing whose gradient is attached within the layers, so that they act under any trainer.

A loss that is added to a model's output is lost where a trainer computes its own, as TRL's do. Here an identity in each
layer adds the gradient of the layer's part in the backward pass, whatever the loss is that this pass begins with. It
acts in training mode on adapters whose router is trained. The parts of one forward pass know of each other by the pass,
which begins and ends with the outermost module that contains all adapted layers; what gradient checkpointing
recomputes belongs to its own pass and is not counted again.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hydralora.layer import in_forward_mode
from hydralora.tokens import RealTokens, entries, real_tokens
from hydralora.tuner.balance.gradient_scale import GradientScale
from hydralora.tuner.balance.pooled import PooledBalance
from hydralora.tuner.balance.terms import AdapterTerms, Term
from hydralora.tuner.balance.unpacking import Unpacking, unpacking
from hydralora.tuner.calls.checkpoints import bind_checkpoints, release_checkpoints
from hydralora.tuner.calls.thread_value import OfThread

OUTSIDE = (
    "balance_weight: this layer runs outside of a forward pass of its model, which would say which tokens are padding. "
    "Call the model, or its decoder"
)
FUNCTIONAL = (
    "balance_weight, information_weight: the gradient of a loss on the routing is added in autograd's backward pass, "
    "which transforms of torch.func and forward mode do not run. Call model.eval(), or train with these weights 0"
)
UNCARRIED = (
    "balance_weight: a backward pass recomputed this layer by a reentrant checkpoint that does not say which forward "
    "pass it belongs to. Let the model checkpoint its layers (gradient_checkpointing of the Trainer), or use the kind "
    "that is not reentrant (use_reentrant=False)"
)


def in_backward() -> bool:
    """Whether a backward pass runs here: what is computed then is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class AdaptedLayer(Protocol):
    """A layer that takes part in the losses.

    Attributes:
        name_in_model: its name in the model that is watched.
        lora_A: the shared A by adapter; a layer takes part in the losses of these adapters.
    """

    name_in_model: str
    lora_A: nn.ModuleDict  # noqa: N815 - the name that PEFT gives it


@dataclass
class ForwardPass:
    """One forward pass in training.

    Attributes:
        tokens: which of its tokens are real.
        owner: the module whose call it is (its `id`).
        texts: where the texts of packed rows are; None: every row is one.
        pools: the pooled balance and its weight, by adapter and number of experts.
        layers: how many layers of an adapter took part.
        masks: which tokens of a layer are real, float32, by what it sees.
    """

    tokens: RealTokens
    owner: int
    texts: Unpacking | None = None
    pools: dict[tuple[str, int], tuple[Term, PooledBalance]] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def valid(self, tokens: torch.Size, device: torch.device) -> Tensor:
        """`RealTokens.valid`, made once for all layers that see the same tokens."""
        key = (id(self.tokens), tokens, device)
        if key not in self.masks:
            self.masks[key] = self.tokens.valid(tokens, device)
        return self.masks[key]

    def texts_of(self, valid: Tensor) -> Unpacking | None:
        """Where the texts of packed rows are in a layer that sees `valid` (B, T); None: every row is one."""
        return self.texts if self.texts is not None and self.texts.shape == tuple(valid.shape) else None

    def valid_texts(self, valid: Tensor) -> Tensor:
        """`valid` where every text of a packed row has a row of its own; made once, too."""
        texts = self.texts_of(valid)
        if texts is None:
            return valid
        key = (id(valid), "texts")
        if key not in self.masks:
            self.masks[key] = texts.valid(valid)
        return self.masks[key]


@dataclass(frozen=True)
class Part:
    """What one layer contributes to the losses of a forward pass.

    Attributes:
        losses: where values are noted, and the scale.
        within: the pass; None: it is not known.
        adapter: its name.
        layer: its name.
        terms: the losses that act.
    """

    losses: AuxiliaryLosses
    within: ForwardPass | None
    adapter: str
    layer: str
    terms: list[Term]

    def count(self, weights: Tensor, probabilities: Tensor) -> None:
        """Take part in the pass, with the router's probabilities (B, T, E) or (B * T, E) and the weights that act."""
        if self.within is None:
            return
        valid = self.within.valid(probabilities.shape[:-1], probabilities.device)
        self.within.layers[self.adapter] = self.within.layers.get(self.adapter, 0) + 1
        experts, packed = probabilities.shape[-1], self.within.texts_of(valid) is not None
        for term in self.terms:
            if term.of_layer is None:
                pool = self.within.pools.setdefault((self.adapter, experts), (term, PooledBalance()))[1]
                acting = weights.detach().expand(probabilities.shape) if packed else weights
                pool.add(self._apart(probabilities, valid), self._apart(acting, valid), self.within.valid_texts(valid))

    def _apart(self, values: Tensor, valid: Tensor) -> Tensor:
        """Values (B, T, E) or (B * T, E) of a layer that sees `valid`; of packed rows (texts, places, E)."""
        texts = None if self.within is None else self.within.texts_of(valid)
        return values if texts is None else texts.apart(values.detach().reshape(*valid.shape, values.shape[-1]))

    def gradient(self, probabilities: Tensor) -> Tensor:
        """Gradient of the weighted losses for the router's probabilities, in their shape, scaled as the loss is."""
        if self.within is None:
            raise RuntimeError(UNCARRIED)
        valid = self.within.valid(probabilities.shape[:-1], probabilities.device)
        experts, layers = probabilities.shape[-1], self.within.layers[self.adapter]
        scale, parts = self.losses.scale, list[Tensor]()
        texts, mask = self.within.texts_of(valid), self.within.valid_texts(valid)
        shape = probabilities.shape if texts is None else torch.Size((*mask.shape, experts))

        def placed(gradient: Tensor) -> Tensor:
            return gradient if texts is None else texts.together(gradient).view(probabilities.shape)

        for term in self.terms:
            if term.of_layer is None:
                pool = self.within.pools[self.adapter, experts][1]
                factor = term.weight * pool.layers / layers * scale.number()
                parts.append(scale.with_scaler(placed(pool.gradient(mask, shape, factor))))
                continue
            with torch.enable_grad():
                leaf = self._apart(probabilities.detach(), valid).reshape(*mask.shape, experts).requires_grad_()
                loss = term.of_layer(leaf, mask, self.layer)
                (found,) = torch.autograd.grad(loss, leaf)
            parts.append(scale.of(placed(found.view(shape)) * (term.weight / layers)))
            self.losses.note(self.adapter, term.name, loss.detach() * term.weight / layers, 1 / layers)
        return functools.reduce(torch.add, parts)


class _Attach(torch.autograd.Function):
    """The weights of the experts as they are; backward adds the gradient of a part for the router's probabilities."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, probabilities: Tensor, part: Part) -> Tensor:
        ctx.part = part
        ctx.save_for_backward(probabilities)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (probabilities,) = ctx.saved_tensors
        return gradients[0], ctx.part.gradient(probabilities), None


class AuxiliaryLosses:
    """The losses on the routing of one model with adapters.

    Attributes:
        adapters: the losses of each adapter by its name.
        scale: how the trainer scales its loss at the moment.
        step: updates made so far, for what depends on it; None until somebody says it.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, AdapterTerms] = {}
        self.scale = GradientScale()
        self.step: int | None = None
        self._running: OfThread[ForwardPass] = OfThread()
        self._handles: list[RemovableHandle] = []
        self._layers: list[AdaptedLayer] = []
        self._values: dict[str, tuple[Tensor, float]] = {}

    def watch(self, model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> None:
        """Follow the forward passes of `model`, in which `layers` by name are all adapted layers, from now on."""
        self.unwatch(model)
        for name, layer in layers.items():
            layer.name_in_model = name  # a copy of the model has it too
        self._layers = list(layers.values())
        for module in entries(model, layers):
            self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))

    def unwatch(self, model: nn.Module) -> None:
        """Take back what `watch` and the passes since put onto `model`."""
        while self._handles:
            self._handles.pop().remove()
        self._layers = []
        release_checkpoints(model, self)

    def left(self, adapter: str) -> None:
        """A layer has deleted this adapter: its losses go with the last one that has it."""
        if not any(adapter in layer.lora_A for layer in self._layers):
            self.forget(adapter)

    def forget(self, adapter: str) -> None:
        """Drop the losses of an adapter that was deleted, and their values that nobody has asked for."""
        self.adapters.pop(adapter, None)
        for name in ("balance_loss", "information_loss"):
            self._values.pop(_key(adapter, name), None)
        while self._handles and not any(terms.at_all for terms in self.adapters.values()):
            self._handles.pop().remove()

    @torch.compiler.disable
    def attach(self, layer: AdaptedLayer, adapter: str, weights: Tensor, probabilities: Tensor) -> Tensor:
        """`weights` of the experts, with the gradient of the losses on `probabilities` attached.

        Args:
            layer: in training.
            adapter: its name; it trains its router.
            weights: (..., E), by which the experts act.
            probabilities: (B, T, E) or (B * T, E) float32 of the router.

        Raises:
            ValueError: the layer runs outside of a forward pass of the model, or sees other tokens than its text.
            RuntimeError: the loss is computed in float16, and how it is scaled is not known; or a transform of
                `torch.func` or forward mode takes the derivatives.
        """
        terms, within = self.adapters[adapter].at(self.step), self._running.get()
        recomputed = in_backward()
        if not terms or (within is None and not recomputed and not torch.is_grad_enabled()):
            return weights
        if in_forward_mode() or torch._C._functorch.maybe_current_level() is not None:
            raise RuntimeError(FUNCTIONAL)
        if within is None and not recomputed:
            raise ValueError(OUTSIDE)
        self.scale.check(probabilities.device)
        part = Part(self, within, adapter, layer.name_in_model, terms)
        if not recomputed:
            part.count(weights, probabilities)
        # The first forward pass of a reentrant checkpoint has no graph; its recomputation has.
        return _Attach.apply(weights, probabilities, part) if torch.is_grad_enabled() else weights

    def note(self, adapter: str, name: str, value: Tensor, share: float = 1.0) -> None:
        """Count the value of a loss, of which this is a `share` of one forward pass."""
        key = _key(adapter, name)
        before = self._values.get(key)
        total = value if before is None else before[0] + value.to(before[0].device)
        self._values[key] = total, share + (0.0 if before is None else before[1])

    def pop(self) -> dict[str, float]:
        """Mean weighted value of each loss over the forward passes since the last call; waits for the device."""
        values = {name: float(total) / count for name, (total, count) in self._values.items()}
        self._values = {}
        return values

    def carried(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which runs in the present pass whenever and in whatever thread it is called."""
        within = self._running.get()

        def in_pass(*args: Any, **kwargs: Any) -> Any:
            with self._running.holding(within):
                return function(*args, **kwargs)

        return in_pass

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the modules that contain all adapted layers."""
        if not torch.is_grad_enabled() or in_backward():
            return
        within = self._running.get()
        if within is None or within.owner == id(module):  # its own: one that was interrupted
            if within is not None:
                within.pools.clear()
            tokens = real_tokens(module, args, kwargs)
            self._running.put(ForwardPass(tokens, id(module), unpacking(tokens.shape, tokens.mask, kwargs)))
            bind_checkpoints(module, self)
        elif not within.tokens.known:  # the outer module was called with other arguments
            within.tokens = real_tokens(module, args, kwargs)
            within.texts = unpacking(within.tokens.shape, within.tokens.mask, kwargs)

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the same modules; the output of one that failed is None."""
        within = self._running.get()
        if within is None or within.owner != id(module):
            return
        self._running.put(None)
        if output is None:
            within.pools.clear()  # the layers in them hold the graph, and the graph holds this pass
        else:
            for (adapter, _), (term, pool) in within.pools.items():  # counted here, which lets go of the graph
                share = pool.layers / within.layers[adapter]
                self.note(adapter, term.name, pool.value() * (term.weight * share), share)


def _key(adapter: str, name: str) -> str:
    """The name of an adapter's loss in the log."""
    return name if adapter == "default" else f"{name}/{adapter}"


def losses_of(model: nn.Module) -> list[AuxiliaryLosses]:
    """The losses on the routing of the adapters in a model, wrapped or not."""
    found: list[AuxiliaryLosses] = []
    for module in model.modules():
        losses = getattr(module, "auxiliary", None)
        if isinstance(losses, AuxiliaryLosses) and not any(losses is known for known in found):
            found.append(losses)
    return found
