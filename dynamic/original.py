"""Checkpoints of the original: `sparse_config` inside `config.json`, predictors among the full weights.

The original starts from LLaVA's configuration class, so `model_type` says "llava_llama" and its own loader has to be
told the class; such a folder is known by its content. Names of tensors are the same there and here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynamic.config import SparseConfig
from dynamic.model import IMAGE, INSTRUCT, OUTPUT_TEXT
from llava.runtime.files import read_errors, read_json, refuse_pointer
from llava.runtime.weights.torch_files import load_plain
from llava.runtime.weights.weight_files import weights_of

CONFIG_FILE = "config.json"
CONFIG_KEY = "sparse_config"
ARCHITECTURE = "DynamicLlavaLlamaForCausalLM"
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ADDED_FILE = "predictors.safetensors"
"""Where the predictors go beside weights in several files."""
OWN_FIELDS = ("vision_decision",)
"""Of the configuration what the original does not know. It acts in training alone, so its folders go without."""


def prefixes(config: SparseConfig) -> list[str]:
    """Beginnings of the names of the tensors that a model of this configuration has."""
    wanted = {
        IMAGE: config.use_vision_predictor,
        OUTPUT_TEXT: config.judges_output_text,
        INSTRUCT: config.judges_instruction,
    }
    return [f"model.{name}." for name, exists in wanted.items() if exists]


def read_config(folder: Path) -> SparseConfig | None:
    """The configuration of the predictors; None if the folder is not of Dynamic-LLaVA.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / CONFIG_FILE
    content = read_json(path) if path.is_file() else {}
    if CONFIG_KEY not in content:
        return None
    if not isinstance(content[CONFIG_KEY], dict):
        raise ValueError(f"{path}: '{CONFIG_KEY}' is {content[CONFIG_KEY]!r:.80}, expected an object")
    try:
        return SparseConfig.from_dict(content[CONFIG_KEY])
    except ValueError as error:
        raise ValueError(f"{path}: '{CONFIG_KEY}': {error}") from error


def read_predictors(folder: Path, config: SparseConfig) -> dict[str, Tensor]:
    """Tensors of the predictors, from the files that hold them and no others.

    Raises:
        ValueError: a file is damaged, or a predictor that `config` switches on has no tensors.
    """
    wanted = prefixes(config)
    tensors: dict[str, Tensor] = {}
    for path in _files_with(folder, wanted):
        tensors |= _read(path, wanted)
    missing = [prefix for prefix in wanted if not any(name.startswith(prefix) for name in tensors)]
    if missing:
        raise ValueError(
            f"{folder}: its '{CONFIG_KEY}' switches on predictors that its weights do not hold: no tensor begins with "
            f"{missing}; it was saved by a program that does not know them"
        )
    return tensors


def predictor_names(folder: Path) -> frozenset[str]:
    """Names of all tensors of predictors in a folder; the original stores those that its configuration switches off."""
    beginnings = tuple(f"model.{name}." for name in (IMAGE, OUTPUT_TEXT, INSTRUCT))
    return frozenset(name for name in weights_of(folder) if name.startswith(beginnings))


def add_to_folder(folder: Path, config: SparseConfig, tensors: Mapping[str, Tensor]) -> None:
    """Make a folder with full weights in upstream's layout one of Dynamic-LLaVA.

    Raises:
        ValueError: the folder has no full weights as safetensors.
    """
    index, single = folder / INDEX_FILES[0], folder / SINGLE_FILES[0]
    portable = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if single.is_file():
        save_file(load_file(single) | portable, single, {"format": "pt"})
    elif index.is_file():
        save_file(portable, folder / ADDED_FILE, {"format": "pt"})
        table = read_json(index)
        table["weight_map"] |= dict.fromkeys(portable, ADDED_FILE)
        _write_object(index, table)
    else:
        raise ValueError(
            f"{folder}: holds no full weights ({SINGLE_FILES[0]} or {INDEX_FILES[0]}); Dynamic-LLaVA keeps its "
            "predictors among them and has no other place for them"
        )
    path = folder / CONFIG_FILE
    known = {name: value for name, value in config.to_dict().items() if name not in OWN_FIELDS}
    content = {**read_json(path), CONFIG_KEY: known, "architectures": [ARCHITECTURE]}
    _write_object(path, content)


def _files_with(folder: Path, wanted: list[str]) -> list[Path]:
    """Files of full weights that may hold a wanted tensor."""
    for name in (SINGLE_FILES[0], INDEX_FILES[0], SINGLE_FILES[1], INDEX_FILES[1]):
        path = folder / name
        if path.is_file() and name in SINGLE_FILES:
            return [path]
        if path.is_file():
            table = read_json(path).get("weight_map")
            if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
                raise ValueError(f"{path}: has no 'weight_map' of file names, so it is not an index of weights")
            return [folder / file for file in sorted({table[key] for key in table if key.startswith(tuple(wanted))})]
    return []


def _read(path: Path, wanted: list[str]) -> dict[str, Tensor]:
    refuse_pointer(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(tuple(wanted))}  # noqa: SIM118
    except read_errors() as error:
        raise ValueError(f"{path}: is damaged or holds more than tensors ({error})") from error
    content = load_plain(path, mapped=True)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a table of named tensors")
    return {name: tensor for name, tensor in content.items() if name.startswith(tuple(wanted))}


def _write_object(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
