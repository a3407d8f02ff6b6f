"""Routed blocks on a model object of upstream's LLaVA, in the running process and reversibly.

The model is an object of `LlavaLlamaForCausalLM` of haotian-liu/LLaVA, or any causal language model of transformers'
shape. Nothing of transformers is replaced: the blocks report their routing to observers, and the attention mask of the
spliced sequence is seen by a hook on the decoder. `moe_patch` puts this file into a checkout, where `with_losses`
stands above the class's `forward`. Needs torch >= 2.1 and nothing else.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hydralora.block import RoutedMLP, release
from hydralora.config import RoutedMLPConfig
from hydralora.layer import Routing, expert_balance_loss
from hydralora.model import RoutingRecorder, attach, batch_of, block_parameters, in_rows

ATTRIBUTE = "hydralora_patch"
"""Where a patched model keeps its `LlavaPatch`."""


def patch_llava(model: Any, config: RoutedMLPConfig | None = None, dtype: torch.dtype = torch.float32) -> LlavaPatch:
    """Make every MLP of the decoder a routed block, in place, and add the expert-balance loss to the model's loss.

    The blocks start as the identity. Their parameters are the only new ones that require gradients; what else is
    trained stays as it is. With LoRA of PEFT, patch after `get_peft_model`, which freezes all that it does not know.

    Args:
        model: of upstream's class, or PEFT's wrapper around one.
        config: of the blocks; None for the defaults of MLLM-HydraLoRA.
        dtype: of the added parameters.

    Returns:
        A handle; its `revert` gives the model back as it was.

    Raises:
        ValueError: a decoder layer has no gated MLP or more than one, or the model is patched already.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return LlavaPatch(bare, config or RoutedMLPConfig(), dtype)


def with_losses(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a class's `forward`: adds the losses of the model's patch, if it has one and labels are given."""
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch = getattr(self, ATTRIBUTE, None)
        labels = signature.bind(self, *args, **kwargs).arguments.get("labels")
        if patch is None or labels is None:
            return forward(self, *args, **kwargs)
        return patch.forward(functools.partial(forward, self), *args, **kwargs)

    patched.adds_losses = True  # type: ignore[attr-defined]
    return patched


class LlavaPatch:
    """What `patch_llava` did to a model, and the way back.

    Attributes:
        model: the bare model.
        config: of the blocks.
        blocks: the routed blocks by their name in the model.
        balance_loss: weighted expert-balance loss of the last forward pass with labels, without graph; None before it.
    """

    def __init__(self, model: Any, config: RoutedMLPConfig, dtype: torch.dtype) -> None:
        if getattr(model, ATTRIBUTE, None) is not None:
            raise ValueError(f"this {type(model).__name__} is patched already; revert its {ATTRIBUTE} first")
        self.model, self.config = model, config
        self.balance_loss: Tensor | None = None
        required = {p: p.requires_grad for p in model.parameters()}
        self.blocks: dict[str, RoutedMLP] = attach(model, config, dtype)
        self._required = {p: required[p] for block in self.blocks.values() for p in block.parameters() if p in required}
        self._recorder = RoutingRecorder(self.blocks)
        self._inner: Any = None  # the forward of the object itself, where something had wrapped it before
        self._outer: Any = None
        if not hasattr(type(model).forward, "adds_losses"):
            self._wrap_forward()
        setattr(model, ATTRIBUTE, self)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the patch added, by their name in the model."""
        return block_parameters(self.model)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights into the blocks.

        Args:
            tensors: every added parameter by its name in the model, as in `extensions/hydralora/model.safetensors`.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; nothing was copied then.
        """
        parameters = dict(self.parameters())
        missing, unknown = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
        wrong = [name for name, p in parameters.items() if name in tensors and tensors[name].shape != p.shape]
        if missing or unknown or wrong:
            raise ValueError(
                f"weights of {len(self.blocks)} routed blocks: {len(missing)} missing {missing[:3]}, {len(unknown)} "
                f"unknown {unknown[:3]}, {len(wrong)} of another shape {wrong[:3]}"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A forward pass with labels, by `call`; the balance loss is added to the loss it returns.

        Raises:
            ValueError: gradient checkpointing of the re-entrant kind hides the routing from the loss.
        """
        if not self.config.needs_balance_loss:
            return call(*args, **kwargs)
        with self._recording() as seen:
            outputs = call(*args, **kwargs)
            routings = [passes[-1] for passes in self._recorder.stop().values() if passes]
            routings = [in_rows(routing, seen["batch"]) or routing for routing in routings]
        self._check_graph(routings)
        mask = seen["attention_mask"]
        balance = self.config.balance_weight * expert_balance_loss(routings, mask)
        self.balance_loss = balance.detach()
        if isinstance(outputs, tuple):
            return outputs[0] + balance.to(outputs[0].device), *outputs[1:]
        outputs.loss = outputs.loss + balance.to(outputs.loss.device)
        return outputs

    @contextmanager
    def _recording(self) -> Iterator[dict[str, Any]]:
        """Record routings, and (B, L) and attention mask of what reaches the decoder: those of the spliced sequence."""
        seen: dict[str, Any] = {"attention_mask": None, "batch": (0, 0)}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["batch"] = batch_of(args, kwargs)
            seen["attention_mask"] = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

        hook = self.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        self._recorder.start()
        try:
            yield seen
        finally:
            hook.remove()
            self._recorder.stop()

    def _check_graph(self, routings: list[Routing]) -> None:
        """The record must hang on the routers, or the balance loss would be added without ever training anything."""
        trained = any(block.router.weight.requires_grad for block in self.blocks.values())
        if torch.is_grad_enabled() and trained and not all(r.probabilities.requires_grad for r in routings):
            raise ValueError(
                "the routing of the blocks has no gradient, so the expert-balance loss would train nothing: gradient "
                'checkpointing is re-entrant; pass gradient_checkpointing_kwargs={"use_reentrant": False}'
            )

    def _wrap_forward(self) -> None:
        """Let the object's own `forward` add the losses, since its class knows nothing of them."""
        self._inner, inner = self.model.__dict__.get("forward"), self.model.forward
        signature = inspect.signature(inner)

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            labels = signature.bind(*args, **kwargs).arguments.get("labels")
            return inner(*args, **kwargs) if labels is None else self.forward(inner, *args, **kwargs)

        self._outer = self.model.forward = forward

    def revert(self) -> None:
        """Take the experts out of the MLPs, and put `forward` and `requires_grad` back; a second call does nothing.

        Raises:
            ValueError: the object's `forward` was wrapped by something else since; undo that first.
        """
        if getattr(self.model, ATTRIBUTE, None) is not self:
            return
        if self._outer is not None:
            if self.model.__dict__.get("forward") is not self._outer:
                raise ValueError(
                    f"forward of this {type(self.model).__name__} was replaced after patch_llava; undo that first"
                )
            if self._inner is None:
                del self.model.forward
            else:
                self.model.forward = self._inner
        for block in self.blocks.values():
            release(block)
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
        delattr(self.model, ATTRIBUTE)
