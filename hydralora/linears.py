"""How HydraLoRA enters the attention layers of a decoder or of a vision tower: one `RoutedUpdate` per projection.

The update is a child of its frozen linear layer and joins the output by a forward hook. So the layer stays what it is:
of its class (quantised ones included), under its name, with the state-dict keys of the base model. Layers are
recognised by what they are, never by words in a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hydralora.config import PARTS, RoutedLinearConfig
from hydralora.layer import RoutedUpdate

CHILD = "routed"
"""Name of the update within its linear layer."""

INPUTS = ("q_proj", "k_proj", "v_proj")
OUTPUTS = ("o_proj", "out_proj")


def projections(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of an attention module of transformers by their name in it; empty if it is none."""
    found = {name: getattr(module, name, None) for name in (*INPUTS, *OUTPUTS)}
    linears = {name: linear for name, linear in found.items() if isinstance(linear, nn.Linear)}
    return linears if linears.keys() >= set(INPUTS) and len(linears) == len(INPUTS) + 1 else {}


def add_updates(
    layers: Mapping[str, Sequence[nn.Module]], config: RoutedLinearConfig, dtype: torch.dtype = torch.float32
) -> None:
    """Put an update on every projection that the configuration names, in place.

    The projections are frozen; everything else keeps its `requires_grad`. The updates stand on the device of the
    projections and start as the identity: the outputs of the model do not change.

    Args:
        layers: for each part that the configuration names the layers that hold one attention module each.
        config: of the updates.
        dtype: of the added parameters.

    Raises:
        ValueError: a part has no layers, a layer has no attention module of the expected shape or is adapted already,
            or a projection does not exist. Nothing has been changed then.
    """
    for linear in [linear for part in PARTS for linear in _wanted(part, layers.get(part, ()), config)]:
        linear.requires_grad_(False)
        update = RoutedUpdate(
            linear.in_features,
            linear.out_features,
            experts=config.experts,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            device=linear.weight.device,
            dtype=dtype,
        )
        linear.add_module(CHILD, update.train(linear.training))
        linear.register_forward_hook(_add_update)


def _add_update(linear: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of an adapted layer: `W0 x + update(x)` in the dtype of `W0 x`."""
    return output + linear.routed(args[0]).to(output.dtype)


def _wanted(part: str, layers: Sequence[nn.Module], config: RoutedLinearConfig) -> list[nn.Linear]:
    """The linear layers of one part that are to be adapted, checked."""
    names = config.projections(part)
    if names is None:
        return []
    if not layers:
        raise ValueError(f"'{part}' is to be adapted, but {PARTS[part]} has no layers here")
    wanted: list[nn.Linear] = []
    for index, layer in enumerate(layers):
        found = [linears for module in layer.modules() if (linears := projections(module))]
        if len(found) != 1:
            raise ValueError(
                f"'{part}': layer {index} of {PARTS[part]} ({type(layer).__name__}) holds {len(found)} attention "
                f"modules with the linear layers {', '.join(INPUTS)} and {' or '.join(OUTPUTS)}, expected 1. Decoders, "
                "CLIP and SigLIP of transformers have them; open_clip keeps all projections in one tensor, so give its "
                "model in transformers' format"
            )
        linears = found[0]
        unknown = sorted(set(names) - set(linears))
        if unknown:
            raise ValueError(f"'{part}': the attention of {PARTS[part]} has no {unknown}; it has {sorted(linears)}")
        wanted += [linears[name] for name in names or linears]
    if any(hasattr(linear, CHILD) for linear in wanted):
        raise ValueError(f"'{part}': {PARTS[part]} has HydraLoRA on its attention already")
    return wanted


def routed_updates(module: nn.Module) -> dict[str, RoutedUpdate]:
    """The updates within `module` by name, in order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, RoutedUpdate)}


def added_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that `add_updates` added, by their name in `model`: exactly these are trained and saved."""
    for update_name, update in routed_updates(model).items():
        for name, parameter in update.named_parameters():
            yield f"{update_name}.{name}", parameter
