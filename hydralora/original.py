"""The tensors of MLLM-HydraLoRA's checkpoints, from and to ours.

MLLM-HydraLoRA stores each expert's B as a tensor of its own in `non_lora_trainables.bin`, under the names of its PEFT
wrapper; ours are stacked. The settings of such a checkpoint are in `moe_args.pth`, see `moe_args.py`. Needs
torch >= 2.1 and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hydralora.config import RoutedMLPConfig
from hydralora.moe_args import ARGUMENTS_FILE

WEIGHTS_FILE = "non_lora_trainables.bin"

_POINTER = b"version https://git-lfs.github.com/spec/"
_PEFT_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<block>.+)\."
    r"(?:shared_LoRA_A_(?P<shared>gate|up|down)|moe_(?P<stacked>gate|up|down)\.(?P<expert>\d+)\.LoRA_B"
    r"|(?P<router>router\.(?:weight|bias)))"
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a file of the original on the CPU, by torch's weights-only loader.

    Raises:
        ValueError: the file is missing, damaged, or holds something else than named tensors.
    """
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
        content = None if is_pointer else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # damaged files surface as many kinds of error, all meaning the same here
        # Not torch's own words: they advise to load the file without the restriction.
        raise ValueError(f"{path}: is damaged or holds more than tensors ({type(error).__name__})") from error
    if is_pointer:
        raise ValueError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a table of named tensors")
    return content


def check_numbers(key: str, tensor: Tensor, path: Path) -> None:
    """Refuse a tensor that is not a weight.

    Raises:
        ValueError: it is not of a floating-point type, or contains NaN or infinite values.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"{path}: '{key}' is {tensor.dtype}, expected floating-point weights")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{path}: '{key}' contains NaN or infinite values")


def is_original_key(key: str) -> bool:
    """True if `key` of a `non_lora_trainables.bin` belongs to a routed MLP block."""
    return _KEY.fullmatch(key) is not None


def from_original(tensors: Mapping[str, Tensor], config: RoutedMLPConfig, path: Path) -> dict[str, Tensor]:
    """The blocks' tensors under our names, the experts' B stacked.

    Args:
        tensors: content of `non_lora_trainables.bin`; keys of other parts are left alone.
        config: expected number of experts and rank.
        path: of the file, for messages.

    Returns:
        Tensors by their name in the model, for example `model.layers.0.mlp.experts_B_gate`, (E, M, r).

    Raises:
        ValueError: a block lacks a tensor or has one too many, or a shape does not fit; file and key are named.
    """
    blocks: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        if (match := _KEY.fullmatch(key)) is not None:
            part = key[match.end("block") + 1 :]
            blocks.setdefault(match["block"], {})[part] = (key, tensor)
    converted: dict[str, Tensor] = {}
    for block, parts in blocks.items():
        _check_block(block, parts, config, path)
        for kind in ("gate", "up", "down"):
            converted[f"{block}.shared_A_{kind}"] = parts[f"shared_LoRA_A_{kind}"][1]
            experts = [parts[f"moe_{kind}.{expert}.LoRA_B"][1] for expert in range(config.experts)]
            converted[f"{block}.experts_B_{kind}"] = torch.stack(experts)  # (E, out, r)
        for name in ("router.weight", "router.bias"):
            converted[f"{block}.{name}"] = parts[name][1]
    return converted


def _check_block(block: str, parts: Mapping[str, tuple[str, Tensor]], config: RoutedMLPConfig, path: Path) -> None:
    """Raise unless `parts` are exactly the tensors of one block of `config`, with shapes that fit one another."""
    shapes = _original_shapes(parts, config)
    missing, extra = sorted(set(shapes) - set(parts)), sorted(set(parts) - set(shapes))
    if missing or extra:
        raise ValueError(
            f"{path}: block '{block}' with {config.experts} experts (per {ARGUMENTS_FILE}): missing {missing}, "
            f"unexpected {extra}"
        )
    for part, shape in shapes.items():
        key, tensor = parts[part]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: '{key}' has shape {tuple(tensor.shape)}, expected {shape}")
        check_numbers(key, tensor, path)


def _original_shapes(parts: Mapping[str, tuple[str, Tensor]], config: RoutedMLPConfig) -> dict[str, tuple[int, ...]]:
    """Expected shape of each tensor of a block; D and M are taken from the two A that tell them."""
    E, r = config.experts, config.rank
    D, M = (parts[name][1].shape[-1] if name in parts else 0 for name in ("shared_LoRA_A_gate", "shared_LoRA_A_down"))
    shapes: dict[str, tuple[int, ...]] = {"router.weight": (E, D), "router.bias": (E,)}
    for kind, inputs, outputs in (("gate", D, M), ("up", D, M), ("down", M, D)):
        shapes[f"shared_LoRA_A_{kind}"] = (r, inputs)
        shapes |= {f"moe_{kind}.{expert}.LoRA_B": (outputs, r) for expert in range(E)}
    return shapes


def to_original(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `from_original`, with the prefix of the original's PEFT wrapper; tensors are copied to the CPU.

    Args:
        parameters: what `hydralora.model.block_parameters` yields.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in parameters:
        values = tensor.detach().cpu()
        block, marker, kind = name.rpartition(".experts_B_")
        if marker:
            for expert, matrix in enumerate(values):
                converted[f"{_PEFT_PREFIX}{block}.moe_{kind}.{expert}.LoRA_B"] = matrix.clone()
        else:
            converted[_PEFT_PREFIX + name.replace(".shared_A_", ".shared_LoRA_A_")] = values.clone()
    return converted
