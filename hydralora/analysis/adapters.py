"""The A and B matrices of adapters of every kind: plain LoRA of PEFT, HydraLoRA, and the original's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hydralora.original import read_weights
from hydralora.tuner.original import ORIGINAL_WEIGHTS, OUR_WEIGHTS, from_original, read_our_weights
from hydralora.tuner.stored import A, B, split_name
from llava.errors import CheckpointError
from llava.runtime.files import read_json

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class AdaptedLayer:
    """The matrices of one adapted layer.

    Attributes:
        name: of the layer in the model, for example `model.layers.0.self_attn.q_proj`.
        shared_a: A, (r, in_features).
        experts_b: every B, (E, out_features, r); plain LoRA has one.
    """

    name: str
    shared_a: Tensor
    experts_b: Tensor

    @property
    def module(self) -> str:
        """Last part of the name, for example `q_proj`."""
        return self.name.rpartition(".")[2]


def read_adapter(place: Path) -> dict[str, AdaptedLayer]:
    """The layers of an adapter by name, in float32.

    Args:
        place: folder of the adapter, or the file of its weights there.

    Raises:
        CheckpointError: the folder is not an adapter of a known kind, or a file is not called as the weights of one.
    """
    if place.is_file() and place.name not in (OUR_WEIGHTS, ORIGINAL_WEIGHTS):
        raise CheckpointError(
            f"{place}: not {OUR_WEIGHTS} or {ORIGINAL_WEIGHTS}; name the folder of the adapter, with its {CONFIG_FILE}"
        )
    folder = place.parent if place.is_file() else place
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG_FILE}, so it is no adapter")
    settings = read_json(config)
    tensors = _tensors(folder)
    kind = settings.get("peft_type")
    try:
        if kind == "LORA" and "lora_nums" in settings:
            tensors, kind = from_original(tensors, folder), "HYDRALORA"
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if kind not in ("LORA", "HYDRALORA"):
        raise CheckpointError(f"{config}: an adapter of the type '{kind}'; LORA and HYDRALORA can be analysed")
    return _layers(tensors, folder)


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / OUR_WEIGHTS
    try:
        return read_our_weights(path) if path.is_file() else read_weights(folder / ORIGINAL_WEIGHTS)
    except ValueError as error:
        raise CheckpointError(f"{folder}: the weights of the adapter cannot be read ({error})") from error


def _layers(tensors: dict[str, Tensor], folder: Path) -> dict[str, AdaptedLayer]:
    layers = {}
    for key, tensor in tensors.items():
        name, part = split_name(key)
        if part == A:
            experts = tensors.get(f"{name}.{B}")
            if experts is None:
                raise CheckpointError(f"{folder}: layer '{name}' has an A and no B")
            short = name.removeprefix("base_model.model.")
            matrices = torch.stack(torch.split(experts.to(torch.float32), len(tensor), dim=1))  # (E, out_features, r)
            layers[short] = AdaptedLayer(short, tensor.to(torch.float32), matrices)
    if not layers:
        raise CheckpointError(f"{folder}: holds no A and B matrices")
    return layers
