"""Adapters of the original, in and out: one `.pth` file `{'model': tensors by the original's names, ...}`.

The tensors are those parameters whose name holds "adapter"; a distributed run writes them with `module.` in front.
The file is read without running pickled code. What it does not say (scale, temperature) comes from the arguments of the
original's run, which it may hold, or from the caller. Upstream: `util/misc.py: save_model`, `load_model`.
"""

from __future__ import annotations

import argparse
import re
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava.runtime.weights.torch_files import load_plain
from mma.config import MmaConfig
from mma.model import EMBEDDING, adapters

WEIGHTS = "model"
"""Key of the tensors in the file."""

RUN = "args"
"""Key of the arguments of the original's run, an `argparse.Namespace`."""

DISTRIBUTED_PREFIX = "module."
PLACES = ("adapter_attn", "adapter_mlp")
"""The original's names of the adapters before attention and before the MLP."""

TOWER_BLOCK = "backbone.visual.transformer.resblocks"
PROJECTOR = {"0": "adapter_proj.conv_A", "2": "adapter_proj.conv_B"}
"""The original's names of the two linear layers of the projector, by their place in ours."""

SETTINGS = ("adapter_scale", "temperature")
"""What the tensors do not say about the adapters."""


@dataclass(frozen=True)
class Original:
    """Adapters as the original saved them.

    Attributes:
        tensors: by the original's names, without `module.`.
        settings: of `SETTINGS`, those that the arguments in the file say.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, float]


def read(path: Path) -> Original:
    """Read a file of the original.

    Raises:
        ValueError: it is damaged, holds more than tensors and plain values, or no adapters.
    """
    content = load_plain(path, [argparse.Namespace])  # attributes and nothing else
    found = content.get(WEIGHTS) if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: has no tensors under '{WEIGHTS}', so it is no checkpoint of LaVIN")
    tensors = {name.removeprefix(DISTRIBUTED_PREFIX): value for name, value in found.items()}
    if not any(PLACES[0] in name.split(".") for name in tensors):
        raise ValueError(f"{path}: no tensor belongs to an adapter (first: {sorted(tensors)[:3]})")
    said = vars(content[RUN]) if isinstance(content.get(RUN), argparse.Namespace) else {}
    return Original(tensors, {name: float(said[name]) for name in SETTINGS if said.get(name) is not None})


def config_of(
    original: Original, source: Path, defaults: Mapping[str, float] | None = None, **settings: float | None
) -> MmaConfig:
    """Configuration of the adapters: kinds and widths from names and shapes.

    Args:
        original: what was read.
        source: for messages.
        defaults: of `SETTINGS`, where neither `settings` nor the file says it; none: those of the original's training.
        settings: of `SETTINGS`; None takes what the file says, or the default.

    Raises:
        ValueError: a tensor that decides is missing, or the two ways contradict each other.
    """
    names = set(original.tensors)
    given = {name: value for name, value in settings.items() if value is not None}
    contradictions = [
        f"{name} {value}, but the file says {original.settings[name]}"
        for name, value in given.items()
        if original.settings.get(name, value) != value
    ]
    if contradictions:
        raise ValueError(f"{source}: given is {'; '.join(contradictions)}")
    first = f"layers.0.{PLACES[0]}"
    try:
        down, up = original.tensors[f"{first}.conv_A.weight"], original.tensors[f"{first}.conv_B.weight"]
    except KeyError as error:
        raise ValueError(f"{source}: the tensor {error} is missing") from error
    return MmaConfig(
        adapter_type="block" if f"layers.0.{PLACES[1]}.conv_A.weight" in names else "attn",
        visual_adapter_type=_visual_type(names),
        adapter_dim=down.shape[0],
        adapter_groups=down.shape[0] // up.shape[1],
        **{**(defaults or {}), **original.settings, **given},
    )


def _visual_type(names: set[str]) -> str:
    first = f"{TOWER_BLOCK}.0"
    if f"{first}.{PLACES[0]}.conv_A.weight" not in names:
        return "none"
    if f"{first}.{PLACES[0]}.conv_D.weight" not in names:
        return "normal"
    return "router_block" if f"{first}.{PLACES[1]}.conv_A.weight" in names else "router"


def hidden_proj(original: Original, source: Path) -> int:
    """Hidden width of the projector.

    Raises:
        ValueError: the file has none.
    """
    name = f"{PROJECTOR['0']}.weight"
    if name not in original.tensors:
        raise ValueError(f"{source}: the tensor '{name}' is missing")
    return original.tensors[name].shape[0]


def original_names(model: Any) -> dict[str, str]:
    """The original's name of every parameter that it trains, by ours; found by module.

    Args:
        model: LLaVA model with adapters, and the projector of LaVIN if its images enter as in LaVIN.
    """
    decoder, tower = model.get_decoder(), model.get_vision_tower()
    places: dict[nn.Module, str] = {}
    for index, layer in enumerate(decoder.layers):
        places |= {adapter: f"layers.{index}.{name}" for adapter, name in zip(adapters(layer), PLACES, strict=False)}
    blocks = [] if tower is None else tower.blocks(tower.loaded())
    for index, block in enumerate(blocks):
        found = zip(adapters(block), PLACES, strict=False)
        places |= {adapter: f"{TOWER_BLOCK}.{index}.{name}" for adapter, name in found}
    if hasattr(decoder, EMBEDDING):
        places[getattr(decoder, EMBEDDING)] = EMBEDDING
    if is_bottleneck(decoder.mm_projector):
        places |= {decoder.mm_projector[int(place)]: name for place, name in PROJECTOR.items()}
    return {
        f"{prefix}.{name}": f"{places[module]}.{name}"
        for prefix, module in model.named_modules()
        if module in places
        for name, _ in module.named_parameters()
    }


def is_bottleneck(projector: nn.Module | None) -> bool:
    """True for Linear, SiLU, Linear."""
    kinds = (nn.Linear, nn.SiLU, nn.Linear)
    return (
        isinstance(projector, nn.Sequential)
        and len(projector) == len(kinds)
        and all(isinstance(part, kind) for part, kind in zip(projector, kinds, strict=True))
    )


def idle_names(original: Original, model: Any) -> set[str]:
    """Names of tensors that the original writes and that no output depends on.

    Gates that its inference creates and never reads, and adapters of tower blocks behind the last class token that is
    taken (every fourth block gives one): the original puts adapters on every block of the tower.
    """
    tower = model.get_vision_tower()
    idle = [r"layers\.\d+\.attention\.gate"]
    if tower is not None:
        numbers = "|".join(map(str, range(tower.num_blocks, tower.shape.layers)))
        idle += [rf"{re.escape(TOWER_BLOCK)}\.({numbers})\.({'|'.join(PLACES)})\..+"] if numbers else []
    return {name for name in original.tensors if any(re.fullmatch(pattern, name) for pattern in idle)}


def from_original(original: Original, model: Any, source: Path) -> dict[str, Tensor]:
    """The tensors by our names; those of `idle_names` are left out.

    Args:
        original: what was read.
        model: with adapters and projector of the configuration that `config_of` gave.
        source: for messages.

    Raises:
        ValueError: names differ from those of the model.
    """
    names = original_names(model)
    missing, unknown = set(names.values()) - set(original.tensors), set(original.tensors) - set(names.values())
    unknown -= idle_names(original, model)
    if missing or unknown:
        raise ValueError(
            f"{source}: does not fit the model; {len(missing)} tensors are missing (first: {sorted(missing)[:3]}), "
            f"{len(unknown)} are unknown (first: {sorted(unknown)[:3]}); is it for another size of base or tower?"
        )
    return {ours: original.tensors[theirs] for ours, theirs in names.items()}


def to_original(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Content of a file of the original: the tensors by its names, in float32.

    Args:
        model: with adapters.
        tensors: by our names; at least all that the original trains.
    """
    names = original_names(model)
    return {WEIGHTS: {theirs: tensors[ours].detach().cpu().float().clone() for ours, theirs in names.items()}}


if __name__ == "__main__":  # the former name of the program
    runpy.run_module("mma.convert", run_name="__main__")
