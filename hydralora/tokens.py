"""Which tokens of a forward pass are real, read from the arguments of the modules through which a pass enters.

A layer sees hidden states only. A loss or a statistic over its tokens has to leave padding out, whoever calls the
model: a Trainer, or a program that calls the inner decoder and computes logits itself.

Shape letters: B batch, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MASK = "attention_mask"
TOKENS = ("input_ids", "inputs_embeds", "inputs")
PAIR = (
    "a loss on the routing is over the tokens of one text, and this model has two, of its encoder and of its decoder; "
    "train it without that loss (balance_weight=0)"
)


@dataclass(frozen=True)
class RealTokens:
    """The tokens of one forward pass.

    Attributes:
        mask: (B, T) bool, false at padding; None: all are real.
        shape: (B, T); None: not known.
        refusal: why they are not known, for an error; empty if they are.
    """

    mask: Tensor | None = None
    shape: tuple[int, int] | None = None
    refusal: str = ""

    @property
    def known(self) -> bool:
        """Whether the call said anything about its tokens."""
        return self.shape is not None or bool(self.refusal)

    def valid(self, tokens: torch.Size, device: torch.device) -> Tensor:
        """Float32 mask (B, T) of the tokens that a layer sees, 1 at real ones.

        Args:
            tokens: (B, T) as the layer sees them; (B * T,), as some models flatten a batch; (B, 1) for what is decided
                once for each row.
            device: of the result.

        Raises:
            ValueError: the layer sees other tokens than those of the text, or which are real is not known.
        """
        if self.refusal:
            raise ValueError(self.refusal)
        found = self._mask_of(tokens, device)
        if found is None:
            raise ValueError(
                f"this layer sees tokens of shape {tuple(tokens)}, and the text has {self.shape}: a loss on the "
                "routing is over the tokens of the text. Leave the layer out of target_modules, or train without it"
            )
        return found

    def of(self, tokens: torch.Size, device: torch.device) -> Tensor:
        """As `valid`, in the shape `tokens`; all are real if they are not those of the text, or nothing is known."""
        found = None if self.refusal else self._mask_of(tokens, device)
        return torch.ones(tokens, device=device) if found is None else found.reshape(tokens)

    def _mask_of(self, tokens: torch.Size, device: torch.device) -> Tensor | None:
        """(B, T) for what a layer sees; None: these are not the tokens of the text."""
        shape = self.shape or (tuple(tokens) if len(tokens) == 2 else (1, tokens.numel()))
        by_row = tuple(tokens) == (shape[0], 1)
        if not by_row and tuple(tokens) not in (shape, (shape[0] * shape[1],)):
            return None
        if self.mask is None:
            return torch.ones(tokens if by_row else shape, device=device)
        mask = self.mask.any(dim=1, keepdim=True) if by_row else self.mask
        return mask.to(device=device, dtype=torch.float32, non_blocking=True)


def real_tokens(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...] | None = None
) -> RealTokens:
    """The real tokens of a call of `module`.

    Args:
        module: its `forward` names the positional arguments.
        args: positional arguments.
        kwargs: the others.
        names: of its positional arguments, where they are known; None: they are read from `forward`.
    """
    given = dict(kwargs)
    if args:
        if names is None:
            parameters = inspect.signature(module.forward).parameters.values()
            names = tuple(item.name for item in parameters if item.kind < item.VAR_POSITIONAL)
        given |= dict(zip(names, args, strict=False))
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return RealTokens(refusal=PAIR)
    shape = next((found for name in TOKENS if (found := _shape(given.get(name))) is not None), None)
    mask = given.get(MASK)
    if mask is None:
        return RealTokens(shape=shape)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"a tensor of {mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        return RealTokens(
            shape=shape,
            refusal=f"{MASK} is {kind}, from which padding cannot be told for a loss on the routing; pass one of shape "
            "(batch, tokens)",
        )
    if shape is not None and mask.shape[1] > shape[1]:  # it begins with the tokens of a prefix or a cache
        mask = mask[:, -shape[1] :]
    return RealTokens(mask != 0, (mask.shape[0], mask.shape[1]))


def _shape(value: Any) -> tuple[int, int] | None:
    """(B, T) of ids (B, T) or embeddings (B, T, D); None for everything else."""
    if isinstance(value, Tensor) and value.ndim == (3 if value.is_floating_point() else 2):
        return value.shape[0], value.shape[1]
    return None


def entries(model: nn.Module, layers: Iterable[str]) -> list[nn.Module]:
    """The modules that contain all of some layers and are called, the outermost first.

    Args:
        model: the outermost.
        layers: names of modules in it.
    """
    paths = [name.split(".")[:-1] for name in layers]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    found = [model.get_submodule(".".join(common[:depth])) for depth in range(len(common) + 1)]
    return [module for module in found if not isinstance(module, nn.ModuleList | nn.ModuleDict)]
