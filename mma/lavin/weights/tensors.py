"""Weights that are read from their files one at a time, so that a 13B model passes through a few gigabytes of memory.

Files are mapped, never unpickled; what is written are the shards and the index that transformers reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from llava.errors import CheckpointError
from llava.model.formats import inspect_checkpoint
from llava.runtime.files import reading
from llava.runtime.weights.derived import is_derived
from llava.runtime.weights.tensors import check_numbers
from llava.runtime.weights.torch_files import load_plain
from llava.runtime.weights.weight_files import WEIGHT_FILES, weight_files

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class LazyTensor:
    """A weight that is made when it is asked for.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        read: makes it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


Weights = Mapping[str, LazyTensor]
"""Weights by their name in transformers' Llama."""


def of_tensor(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already, or mapped from a file."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def map_torch_file(path: Path) -> dict[str, Any]:
    """Content of a torch file without running its pickle; tensors stay in the file until they are used.

    Raises:
        CheckpointError: it is missing, damaged, or no table of named tensors.
    """
    content = load_plain(path, mapped=True)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds something else than a table of named tensors")
    return content


def _read_safetensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    weights = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (the file is no mapping)
            part = file.get_slice(name)
            dtype = part[:0].dtype if part.get_shape() else file.get_tensor(name).dtype
            weights[name] = LazyTensor(tuple(part.get_shape()), dtype, partial(_read_safetensor, path, name))
    return weights


def open_folder(folder: Path) -> dict[str, LazyTensor]:
    """Weights of a Hugging Face folder, in one file or several, `.safetensors` or `.bin`.

    Frequencies that old versions of transformers stored are left out: `check_frequencies` compares them.

    Raises:
        CheckpointError: files are missing, damaged, or hold no weights.
    """
    contents = inspect_checkpoint(folder)
    if contents.weights is None:
        raise CheckpointError(f"{folder}: holds none of {WEIGHT_FILES}")
    weights: dict[str, LazyTensor] = {}
    for path in weight_files(contents.weights):
        if path.suffix == ".safetensors":
            weights |= _open_safetensors(path)
        else:
            weights |= {name: of_tensor(tensor) for name, tensor in map_torch_file(path).items()}
    return {name: tensor for name, tensor in weights.items() if not is_derived(name)}


def write_folder(weights: Weights, folder: Path, max_shard_size: str = "5GB") -> None:
    """Write weights as safetensors; at any time no more than one file of them is in memory.

    Args:
        weights: what to write.
        folder: exists.
        max_shard_size: largest file; several come with an index.
    """
    plan = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in weights.items()}
    split = split_torch_state_dict_into_shards(plan, max_shard_size=max_shard_size)
    with tqdm(total=len(weights), unit="weight", desc="writing") as progress:
        for filename, names in split.filename_to_tensors.items():
            tensors = {}
            for name in names:
                with reading(folder, f"'{name}' cannot be put together from its files"):
                    tensors[name] = weights[name].read().contiguous()
                check_numbers({name: tensors[name]}, f"the source of {folder}")
                progress.update()
            save_file(tensors, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
