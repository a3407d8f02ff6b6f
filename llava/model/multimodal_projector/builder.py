"""Projectors: upstream's `linear`, `mlpNx_gelu`, `identity` (`multimodal_projector/builder.py`), LaVIN's bottleneck.

State-dict keys are upstream's: `0.weight`, `2.weight`, ... for an MLP, `weight` for a single linear layer.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from llava.errors import FlagError


class IdentityMap(nn.Module):
    """Projector that changes nothing; needs a tower as wide as the language model."""

    def forward(self, features: Tensor) -> Tensor:
        """Return `features` (N, P, D) unchanged."""
        return features


def build_vision_projector(config: Any) -> nn.Module:
    """Projector named by `config.mm_projector_type`, from `config.mm_hidden_size` to `config.hidden_size`.

    `mlpNx_gelu` is Linear, then N - 1 times (exact GELU, Linear); `bottleneckH_silu` is Linear to H, SiLU, Linear, with
    LaVIN's initial values.

    Raises:
        FlagError: unknown type, or `identity` between different widths.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    width_in, width_out = config.mm_hidden_size, config.hidden_size
    if kind == "linear":
        return nn.Linear(width_in, width_out)
    if kind == "identity":
        if width_in != width_out:
            raise FlagError(f"--mm_projector_type identity needs equal widths; tower {width_in}, LLM {width_out}")
        return IdentityMap()
    match = re.fullmatch(r"bottleneck([1-9]\d*)_silu", kind)
    if match is not None:
        return _bottleneck(width_in, int(match.group(1)), width_out)
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise FlagError(
            f"--mm_projector_type is '{kind}'; known: linear, identity, mlpNx_gelu (for example mlp2x_gelu), "
            "bottleneckH_silu (for example bottleneck128_silu)"
        )
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(1, int(match.group(1))):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


def _bottleneck(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Linear, SiLU, Linear; weights by Xavier's rule, biases zero."""
    layers = nn.Sequential(nn.Linear(width_in, hidden), nn.SiLU(), nn.Linear(hidden, width_out))
    for linear in (layers[0], layers[2]):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return layers
