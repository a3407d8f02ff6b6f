"""Losses on the routing whose gradient is attached within the layers, so that they act under any trainer.

A loss that is added to a model's output is lost where a trainer computes its own, as TRL's do. Here the backward pass
adds the gradient, whatever the loss is that this pass begins with; it acts in training mode on adapters whose router is
trained. The layers of one forward pass know of each other by the pass, which begins and ends with the outermost module
that contains all adapted layers. How the gradient is found says `eager.py`, and for a pass that torch.compile traces
`compiled.py`.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hydralora.layer import in_forward_mode
from hydralora.tokens import entries, real_tokens
from hydralora.tuner.balance.compiled import TracedPass, text_starts
from hydralora.tuner.balance.eager import ForwardPass, Part, in_backward
from hydralora.tuner.balance.gradient_scale import GradientScale
from hydralora.tuner.balance.operations import Numbered, numbered
from hydralora.tuner.balance.terms import AdapterTerms
from hydralora.tuner.balance.unpacking import unpacking
from hydralora.tuner.calls.checkpoints import bind_checkpoints, release_checkpoints
from hydralora.tuner.calls.inputs import parameter_names
from hydralora.tuner.calls.thread_value import OfThread

OUTSIDE = (
    "balance_weight: this layer runs outside of a forward pass of its model, which would say which tokens are padding. "
    "Call the model, or its decoder"
)
FUNCTIONAL = (
    "balance_weight, information_weight: the gradient of a loss on the routing is added in autograd's backward pass, "
    "which transforms of torch.func and forward mode do not run. Call model.eval(), or train with these weights 0"
)


class AdaptedLayer(Protocol):
    """A layer that takes part in the losses.

    Attributes:
        name_in_model: its name in the model that is watched.
        lora_A: the shared A by adapter; a layer takes part in the losses of these adapters.
    """

    name_in_model: str
    lora_A: nn.ModuleDict  # noqa: N815 - the name that PEFT gives it


class AuxiliaryLosses(Numbered):
    """The losses on the routing of one model with adapters.

    Attributes:
        adapters: the losses of each adapter by its name.
        scale: how the trainer scales its loss at the moment.
        step: updates made so far, for what depends on it; None until somebody says it.
        model: whose passes are followed.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, AdapterTerms] = {}
        self.scale = GradientScale()
        self.step: int | None = None
        self.model: nn.Module | None = None
        self._running: OfThread[ForwardPass | TracedPass] = OfThread()
        self._handles: list[RemovableHandle] = []
        self._layers: list[AdaptedLayer] = []
        self._values: dict[str, tuple[Tensor, float]] = {}
        self.take_number()

    def watch(self, model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> None:
        """Follow the forward passes of `model`, in which `layers` by name are all adapted layers, from now on."""
        self.unwatch(model)
        for name, layer in layers.items():
            layer.name_in_model = name  # a copy of the model has it too
        self.model, self._layers = model, list(layers.values())
        for module in entries(model, layers):
            begin = functools.partial(self._begin, parameter_names(module))
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))

    def unwatch(self, model: nn.Module) -> None:
        """Take back what `watch` and the passes since put onto `model`."""
        while self._handles:
            self._handles.pop().remove()
        self.model, self._layers = None, []
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
        within = self._running.place if torch.compiler.is_compiling() else self._running.get()
        if not isinstance(within, TracedPass):
            if not torch.is_grad_enabled() and within is None and not self._running.outside:
                return weights  # where no pass is under way, a call without gradients is traced, too
            return self._attach(layer, adapter, weights, probabilities)
        if torch.compiler.is_compiling() or not in_backward():
            self.scale.check(probabilities.device)
            within.keep(adapter, layer.name_in_model, weights, probabilities)
        return weights

    @torch.compiler.disable
    def _attach(self, layer: AdaptedLayer, adapter: str, weights: Tensor, probabilities: Tensor) -> Tensor:
        """`attach` in a pass that is not traced."""
        terms, running = self.adapters[adapter].at(self.step), self._running.get()
        within, recomputed = running if isinstance(running, ForwardPass) else None, in_backward()
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
        return part.attached(weights, probabilities) if torch.is_grad_enabled() else weights

    def note(self, adapter: str, name: str, value: Tensor, share: float = 1.0) -> None:
        """Count the value of a loss, of which this is a `share` of one forward pass."""
        key = _key(adapter, name)
        before = self._values.get(key)
        total = value if before is None else before[0] + value.to(before[0].device)
        self._values[key] = total, share + (0.0 if before is None else before[1])

    def weight_of(self, adapter: str, term: str, value: Tensor) -> Tensor:
        """Gradient () for the loss of a traced pass, from its backward pass; its weighted value is noted."""
        acting = {each.name: each.weight for each in self.adapters[adapter].at(self.step)}
        if term in acting:
            self.note(adapter, term, value * acting[term])
        return self.scale.of(torch.full_like(value, acting.get(term, 0.0)))

    def averaged(self, adapter: str, layer: str, shares: Tensor) -> Tensor:
        """The running mean (E,) of `shares` (E,) for a traced pass; a balance loss that does not act counts none.

        Nothing of `shares` is kept: a compiled graph writes other numbers there afterwards.
        """
        terms = self.adapters[adapter]
        acts = any(each.name == "balance_loss" for each in terms.at(self.step))
        return terms.shares.update(layer, shares.clone()) if acts else shares

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

    def _begin(self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the modules that contain all adapted layers; `names`: of positional arguments."""
        if not torch.is_grad_enabled():
            return
        traced = torch.compiler.is_compiling() and (self._running.place is not None or not self._running.outside)
        if not traced or recomputes(self.number):
            self._begin_untraced(names, module, args, kwargs)
            return
        within = self._running.place
        if not isinstance(within, TracedPass) or within.owner == id(module) or not within.tokens.known:
            tokens = real_tokens(module, args, kwargs, names)
            starts = text_starts(tokens.shape, tokens.mask, kwargs)
            if not isinstance(within, TracedPass) or within.owner == id(module):  # its own: one that was interrupted
                self._running.put(TracedPass(tokens, id(module), starts))
            else:  # the outer module was called with other arguments
                within.tokens, within.starts = tokens, starts

    @torch.compiler.disable
    def _begin_untraced(
        self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """`_begin` where Python runs."""
        if in_backward():
            return
        within = self._running.get()
        if within is None or within.owner == id(module):
            if isinstance(within, ForwardPass):
                within.pools.clear()
            tokens = real_tokens(module, args, kwargs, names)
            self._running.put(ForwardPass(tokens, id(module), unpacking(tokens.shape, tokens.mask, kwargs)))
            bind_checkpoints(module, self)
        elif isinstance(within, ForwardPass) and not within.tokens.known:
            within.tokens = real_tokens(module, args, kwargs, names)
            within.texts = unpacking(within.tokens.shape, within.tokens.mask, kwargs)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the same modules; the output of one that failed is None."""
        if not torch.is_grad_enabled():
            return None
        within = self._running.place if torch.compiler.is_compiling() else self._running.get()
        if not isinstance(within, TracedPass):
            self._end_untraced(module, output)
            return None
        if within.owner != id(module):
            return None
        self._running.put(None)
        return None if output is None else within.attached(self.number, self.adapters, output)

    @torch.compiler.disable
    def _end_untraced(self, module: nn.Module, output: Any) -> None:
        """`_end` of a pass in which Python runs."""
        within = self._running.get()
        if not isinstance(within, ForwardPass) or within.owner != id(module):
            return
        self._running.put(None)
        if output is None:
            within.pools.clear()  # the layers in them hold the graph, and the graph holds this pass
        else:
            for (adapter, _), (term, pool) in within.pools.items():  # counted here, which lets go of the graph
                share = pool.layers / within.layers[adapter]
                self.note(adapter, term.name, pool.value() * (term.weight * share), share)


@torch.compiler.assume_constant_result
def recomputes(losses: int) -> bool:
    """Whether a model checkpoints its layers, in whose functions a traced pass can keep nothing; asked in every trace.

    It can where `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint` is set.
    """
    model = numbered(losses).model
    if torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint or model is None:
        return False
    return any(getattr(m, "gradient_checkpointing", False) or hasattr(m, "checkpoint_fn") for m in model.modules())


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
