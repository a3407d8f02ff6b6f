"""Adapters of the original HydraLoRA (its fork of PEFT) from and to ours, tensor for tensor.

The original writes `lora_A`, one `lora_B<i>` per expert and `lora_route` for each layer into `adapter_model.bin`, with
`peft_type` LORA in `adapter_config.json`. Ours are PEFT folders of the type HYDRALORA, with the tensors of `stored.py`:
all B of a layer in one. One expert has no use for a router; a folder that was converted keeps it for the way back.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydralora.original import read_weights
from hydralora.tuner.config import HydraLoraConfig
from hydralora.tuner.stored import ROUTER, A, B, from_earlier, split_name
from llava.errors import CheckpointError
from llava.runtime.files import check_torch_file, read_json, reading, refuse_pointer
from llava.runtime.output import check_new, new_path
from llava.runtime.weights.adapter_counts import check_layers
from llava.runtime.weights.settings import LORA, Rule, check_settings
from llava.runtime.weights.tensors import check_numbers

CONFIG_FILE = "adapter_config.json"
ORIGINAL_WEIGHTS = "adapter_model.bin"
OUR_WEIGHTS = "adapter_model.safetensors"

ADAPTER = {**LORA, "lora_nums": Rule("int", 1, 1024, required=True)}
"""What the original's `adapter_config.json` must say."""

_ORIGINAL_KEY = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<single>A|route)|lora_B(?P<expert>\d+))\.weight")
_OUR_NAME = {"A": A, "route": ROUTER}


def from_original(tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Our tensors of the original's, the experts' B side by side in their order.

    Raises:
        ValueError: a key is unknown, or a layer lacks A, the router or an expert; the message names `source`.
    """
    converted: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _ORIGINAL_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{source}: '{key}' is no tensor of the original (lora_A, lora_B<i>, lora_route)")
        if match["single"]:
            converted[f"{match['layer']}.{_OUR_NAME[match['single']]}"] = tensor
        else:
            experts.setdefault(match["layer"], {})[int(match["expert"])] = tensor
    layers = {split_name(key)[0] for key in converted} | set(experts)
    for layer in layers:
        found = experts.get(layer, {})
        missing = [name for name in _OUR_NAME.values() if f"{layer}.{name}" not in converted]
        if missing or sorted(found) != list(range(len(found))) or not found:
            raise ValueError(f"{source}: layer '{layer}' is incomplete: experts {sorted(found)}, lacking {missing}")
        shapes = {number: tuple(matrix.shape) for number, matrix in sorted(found.items())}
        if len(set(shapes.values())) > 1 or len(shapes[0]) != 2:
            raise ValueError(
                f"{source}: the experts of layer '{layer}' have the shapes {shapes}, expected one of two numbers"
            )
        converted[f"{layer}.{B}"] = torch.cat([found[number] for number in range(len(found))], dim=1)
    return converted


def to_original(tensors: Mapping[str, Tensor], source: str | Path = "") -> dict[str, Tensor]:
    """The original's tensors of ours.

    Args:
        tensors: by our names.
        source: file that they come from, for messages.

    Raises:
        ValueError: a tensor belongs to something else, for example to `modules_to_save`.
    """
    _check_names(tensors, source)
    converted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, name = split_name(key)
        if name == B:
            matrices = torch.split(tensor, len(tensors[f"{layer}.{A}"]), dim=1)
            converted |= {f"{layer}.lora_B{number}.weight": b.clone() for number, b in enumerate(matrices)}
        else:
            converted[f"{layer}.{'lora_A' if name == A else 'lora_route'}.weight"] = tensor
    for layer in {split_name(key)[0] for key in tensors}:
        if f"{layer}.{ROUTER}" not in tensors:  # one expert: the original has a router, whose softmax is 1
            converted[f"{layer}.lora_route.weight"] = torch.zeros_like(tensors[f"{layer}.{A}"][:1])
    return converted


def _check_names(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    for key in tensors:
        if split_name(key)[1] not in (A, B, ROUTER):
            raise ValueError(
                f"{source}: '{key}' is not a tensor of a HydraLoRA layer; the original's format has no place for it"
            )


def check_counts(tensors: Mapping[str, Tensor], config: HydraLoraConfig, source: Path) -> None:
    """Refuse tensors, by our names, that are not those of an adapter of this configuration.

    Raises:
        CheckpointError: a layer has another number of experts or another rank, its matrices do not fit one another, a
            layer or a target is missing, or a tensor is not of finite numbers.
    """
    check_numbers(tensors, source)
    experts, rank = config.lora_nums, config.r
    layers = {split_name(name)[0] for name in tensors}
    parts = (A, B, ROUTER) if experts > 1 else (A, B)
    for layer in sorted(layers):
        lacking = [f"{layer}.{part}" for part in parts if f"{layer}.{part}" not in tensors]
        if lacking:
            raise CheckpointError(f"{source}: layer '{layer}' is incomplete, it lacks {lacking}")
        a, b = tensors[f"{layer}.{A}"], tensors[f"{layer}.{B}"]
        if a.dim() != 2 or len(a) != rank:
            raise CheckpointError(
                f"{source}: A of '{layer}' has shape {tuple(a.shape)}, but {CONFIG_FILE} says r {rank}"
            )
        if b.dim() != 2 or b.shape[1] != experts * rank or not b.shape[0]:
            raise CheckpointError(
                f"{source}: the experts of '{layer}' have shape {tuple(b.shape)}, but {CONFIG_FILE} says {experts} "
                f"experts of rank {rank}, so (outputs, {experts * rank})"
            )
        router = tensors.get(f"{layer}.{ROUTER}")
        if router is not None and tuple(router.shape) != (experts, a.shape[1]):
            raise CheckpointError(
                f"{source}: the router of '{layer}' has shape {tuple(router.shape)}, expected {(experts, a.shape[1])}"
            )
    targets = config.target_modules
    check_layers(layers, source, None if isinstance(targets, str) or targets is None else targets)


def config_from_original(values: Mapping[str, Any], source: str | Path) -> HydraLoraConfig:
    """Our configuration of the original's.

    Raises:
        ValueError: it is no configuration of the original, or asks for something that is not carried out here.
    """
    if values.get("peft_type") != "LORA" or "lora_nums" not in values:
        raise ValueError(f"{source}: is no configuration of the original HydraLoRA (peft_type LORA with lora_nums)")
    refused = [name for name in ("fan_in_fan_out", "merge_weights", "enable_lora") if values.get(name)]
    if refused:
        raise ValueError(f"{source}: {refused} cannot be carried out; the original's training never sets them")
    kept = ("r", "lora_alpha", "lora_nums", "lora_dropout", "bias", "target_modules", "modules_to_save", "task_type")
    names = (*kept, "base_model_name_or_path", "inference_mode")
    check_settings(values, ADAPTER, source)
    _check_targets(values, source)
    with reading(source, "no adapter can be made with these settings"):
        return HydraLoraConfig(**{name: values[name] for name in names if name in values})


def _check_targets(values: Mapping[str, Any], source: str | Path) -> None:
    targets = values.get("target_modules")
    if not (isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)):
        raise CheckpointError(f"{source}: 'target_modules' is {targets!r:.80}, expected a list of names")


_OF_THE_ORIGINAL = {"r", "lora_alpha", "lora_nums", "lora_dropout", "target_modules", "modules_to_save", "bias"}
_OF_THE_ORIGINAL |= {"task_type", "base_model_name_or_path", "inference_mode", "peft_type"}
"""Options that the original has too."""

_WITHOUT_EFFECT = {"init_lora_weights", "init_weights", "init", "auto_mapping", "peft_version", "revision"}
_WITHOUT_EFFECT |= {"balance_weight", "balance", "balance_ema", "balance_warmup", "information_weight"}
_WITHOUT_EFFECT |= {"head_dropout", "expert_dropout", "head_dropout_start", "frozen_experts"}
"""Options that only say how an adapter was begun or trained, and where its base comes from."""


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def config_to_original(config: HydraLoraConfig) -> dict[str, Any]:
    """The original's configuration of ours, all fields that it writes.

    Raises:
        ValueError: the adapter uses something that the original does not have.
    """
    if config.routing != "token" or isinstance(config.target_modules, str):
        raise ValueError(
            f"routing '{config.routing}' and target_modules {config.target_modules!r}: the original routes by token "
            "and takes target modules as a list"
        )
    changed = {
        item.name: value
        for item in dataclasses.fields(config)
        if item.name not in _WITHOUT_EFFECT | _OF_THE_ORIGINAL
        and (value := getattr(config, item.name)) not in (_default(item), None, [], {}, set())
    }
    if changed:
        raise ValueError(f"{changed}: the original has no such choice; it adapts every layer that target_modules names")
    return {
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": config.bias,
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_nums": config.lora_nums,
        "merge_weights": False,
        "modules_to_save": None if config.modules_to_save is None else sorted(config.modules_to_save),
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": sorted(config.target_modules or ()),
        "task_type": config.task_type,
    }


def is_original(folder: Path) -> bool:
    """True if the folder holds an adapter of the original; False for every other one.

    Raises:
        ValueError: it holds no adapter, or its configuration cannot be read.
    """
    values = _read_config(folder)
    return values.get("peft_type") == "LORA" and "lora_nums" in values


def read_original_config(folder: Path) -> HydraLoraConfig:
    """Our configuration of an adapter of the original; errors as of `config_from_original`."""
    return config_from_original(_read_config(folder), folder / CONFIG_FILE)


def import_adapter(source: Path, target: Path) -> HydraLoraConfig:
    """Read a folder of the original and write it as a PEFT folder that `PeftModel.from_pretrained` loads.

    Raises:
        ValueError: `source` is no such folder, or `target` exists.
    """
    check_new(target, [source])
    config = read_original_config(source)
    path = source / ORIGINAL_WEIGHTS
    check_torch_file(path)
    tensors = from_original(read_weights(path), path)
    check_counts(tensors, config, path)
    with _new_folder(target, source) as folder:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / OUR_WEIGHTS)
        config.save_pretrained(str(folder))
    return config


def export_adapter(source: Path, target: Path) -> None:
    """Write a HYDRALORA folder of PEFT in the original's layout.

    Raises:
        ValueError: `source` is no such folder, it holds something that the original has no place for, or `target`
            exists.
    """
    check_new(target, [source])
    stored = _read_config(source)
    if stored.get("peft_type") != "HYDRALORA":
        raise ValueError(f"{source / CONFIG_FILE}: is no HydraLoRA adapter (peft_type HYDRALORA)")
    if not isinstance(stored.get("target_modules"), str):  # a pattern has a message of its own
        _check_targets(stored, source / CONFIG_FILE)
    with reading(source / CONFIG_FILE):
        config = HydraLoraConfig.from_pretrained(str(source))
    path = source / OUR_WEIGHTS
    values, ours = config_to_original(config), read_our_weights(path)
    _check_names(ours, path)
    check_counts(ours, config, path)
    tensors = to_original(ours, path)
    with _new_folder(target, source) as folder:
        torch.save(tensors, folder / ORIGINAL_WEIGHTS)
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_our_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file on the CPU, under today's names.

    Raises:
        ValueError: the file is missing or damaged.
    """
    refuse_pointer(path)
    try:
        return from_earlier(load_file(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged ({error})") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: has no {CONFIG_FILE}, so it is no adapter")
    return read_json(path)


@contextmanager
def _new_folder(target: Path, source: Path) -> Iterator[Path]:
    """A folder that appears under the name `target` when the block ends well, and not at all otherwise.

    Raises:
        ValueError: `target` exists, or falls on `source`.
    """
    with new_path(target, [source]) as folder:
        folder.mkdir()
        yield folder
