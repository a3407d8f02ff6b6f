"""Stored adapters and LLaVA checkpoints as folders of plain LoRA: from their files, or measured on records.

Read are HydraLoRA adapters of PEFT and of the authors, and LLaVA checkpoints with routed blocks or updates, with the
LoRA next to them. What a checkpoint has besides, as the projector, stays there.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hydralora.block import KINDS
from hydralora.choices import MEAN, Weights
from hydralora.config import HydraLoraSettings
from hydralora.extension import HydraLoraExtension
from hydralora.linears import CHILD
from hydralora.original import read_weights
from hydralora.text.samples import read_samples, tokenize
from hydralora.tuner.config import HydraLoraConfig
from hydralora.tuner.export import LoraExport, save_as_lora, save_clusters_as_lora, save_tasks_as_lora
from hydralora.tuner.export import folder as files
from hydralora.tuner.export.constant import RoutedPart, plain_lora, vectors
from hydralora.tuner.loading import load_adapter
from hydralora.tuner.original import (
    ORIGINAL_WEIGHTS,
    OUR_WEIGHTS,
    check_counts,
    from_original,
    is_original,
    read_original_config,
    read_our_weights,
)
from hydralora.tuner.stored import A, B
from llava.errors import CheckpointError
from llava.runtime.files import check_torch_file, read_json, reading, refuse_pointer
from llava.runtime.output import check_new, new_path
from llava.runtime.weights.tensors import check_numbers

EXTENSION = Path("extensions") / HydraLoraExtension.name
OF_EVERY_LAYER = {
    *("r", "lora_alpha", "alpha_pattern", "use_rslora", "lora_nums", "lora_dropout", "routing", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "init", "init_weights", "init_lora_weights"),
    *("head_dropout", "head_dropout_start", "expert_dropout", "balance_weight", "peft_type", "task_type"),
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
}
"""Options that give the factor of an update, or only say how it was trained. Others need the loaded model."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the files of an adapter or a checkpoint hold.

    Attributes:
        parts: its routed and plain LoRA layers.
        base: name of the model that it was trained on, or None.
        task_type: of PEFT, or None.
    """

    parts: list[RoutedPart]
    base: str | None
    task_type: str | None


def read_parts(source: Path) -> Stored:
    """The layers in a folder.

    Raises:
        ValueError: it holds nothing of HydraLoRA, something that a LoRA cannot hold, or damaged files.
    """
    if (source / EXTENSION).is_dir():
        path = source / EXTENSION / "model.safetensors"
        refuse_pointer(path)
        with reading(path):
            tensors = load_file(path)
        return _of_checkpoint(source, read_json(source / EXTENSION / "config.json"), tensors, path)
    imported = HydraLoraExtension().import_checkpoint(source)
    if imported is not None:
        return _of_checkpoint(source, imported.config, imported.tensors, source)
    return _of_adapter(source)


def _of_adapter(source: Path) -> Stored:
    """The layers of an adapter of PEFT or of the authors."""
    if is_original(source):
        config, path = read_original_config(source), source / ORIGINAL_WEIGHTS
        check_torch_file(path)
        tensors = from_original(read_weights(path), path)
    else:
        path = source / files.CONFIG
        if read_json(path).get("peft_type") != "HYDRALORA":
            raise CheckpointError(f"{path}: is not a HydraLoRA adapter (peft_type HYDRALORA)")
        with reading(path):
            config = HydraLoraConfig.from_pretrained(str(source))  # type: ignore[assignment]
        path = source / OUR_WEIGHTS
        tensors = read_our_weights(path)
    _refuse_options(config, source / files.CONFIG)
    others = [name for name in tensors if not name.endswith((A, B, "lora_router.weight"))]
    if others:
        raise CheckpointError(
            f"{path}: '{others[0]}' is not a tensor of a HydraLoRA layer; servers of LoRA do not load it"
        )
    check_counts(tensors, config, path)
    layers = sorted({name.removesuffix(f".{A}") for name in tensors if name.endswith(f".{A}")})
    parts = []
    for layer in layers:
        name = layer.removeprefix(files.PREFIX)
        b = tensors[f"{layer}.{B}"].unflatten(1, (config.lora_nums, config.r)).transpose(0, 1)
        parts.append(RoutedPart(name, name, tensors[f"{layer}.{A}"], b, config.for_layer(name).scaling))
    return Stored(parts, config.base_model_name_or_path, config.task_type)


def _refuse_options(config: HydraLoraConfig, source: Path) -> None:
    """Refuse what changes factors or shapes of single layers: only the loaded model knows these."""
    changed = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if item.name not in OF_EVERY_LAYER and value not in (default, None, [], {}, set()):
            changed[item.name] = value
    if changed:
        raise CheckpointError(
            f"{source}: {changed} cannot be converted from the files alone; load the model and call "
            "hydralora.save_as_lora, or pass --base and --records"
        )


def _of_checkpoint(source: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Stored:
    """The layers of a LLaVA checkpoint, plain LoRA included."""
    with reading(path):
        settings = HydraLoraSettings.from_dict(config)
    check_numbers(tensors, path)
    parts = [*_blocks(settings, tensors), *_updates(settings, tensors)]
    if not parts:
        raise CheckpointError(f"{path}: has no routed blocks and no updates")
    lora, base, task = _lora(source)
    return Stored([*parts, *lora], base, task)


def _blocks(settings: HydraLoraSettings, tensors: Mapping[str, Tensor]) -> Iterator[RoutedPart]:
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.+)\.shared_A_(gate|up|down)", name)
        if found and settings.mlp is not None:
            block, kind = found.groups()
            linear = next(each for each, short in KINDS.items() if short == kind)
            b = tensors[f"{block}.experts_B_{kind}"]
            yield RoutedPart(f"{block}.{linear}", block, tensor, b, settings.mlp.alpha / settings.mlp.rank)


def _updates(settings: HydraLoraSettings, tensors: Mapping[str, Tensor]) -> Iterator[RoutedPart]:
    for name, tensor in tensors.items():
        router, _, part = name.rpartition(".")
        if part == "shared_A" and settings.linear is not None:
            linear = router.removesuffix(f".{CHILD}")
            scaling = settings.linear.alpha / settings.linear.rank
            yield RoutedPart(linear, router, tensor, tensors[f"{router}.experts_B"], scaling)


def _lora(source: Path) -> tuple[list[RoutedPart], str | None, str | None]:
    """Plain LoRA of a checkpoint, its base and its task; none without the file.

    Raises:
        CheckpointError: it is more than A and B with one factor.
    """
    path = source / files.CONFIG
    if not path.is_file():
        return [], None, None
    values = read_json(path)
    more = {
        name: values[name]
        for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
        if values.get(name)
    }
    if values.get("peft_type") != "LORA" or more or values.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: {more or values.get('peft_type')}: the adapter is more than a plain LoRA")
    weights = source / OUR_WEIGHTS
    if weights.is_file():
        refuse_pointer(weights)
        with reading(weights):
            tensors = load_file(weights)
    else:
        tensors = read_weights(source / ORIGINAL_WEIGHTS)
    check_numbers(tensors, source)
    scaling = values["lora_alpha"] / (math.sqrt(values["r"]) if values.get("use_rslora") else values["r"])
    parts = []
    for key, tensor in tensors.items():
        if key.endswith(f".{A}"):
            layer = key.removesuffix(f".{A}")
            name = layer.removeprefix(files.PREFIX)
            parts.append(RoutedPart(name, name, tensor, tensors[f"{layer}.{B}"][None], scaling))
    return parts, values.get("base_model_name_or_path"), values.get("task_type")


def convert_files(source: Path, target: Path, weights: Weights | Mapping[str, Weights]) -> list[Path]:
    """Write plain LoRA with constant weights, from files alone.

    Args:
        source: folder of an adapter, or of a LLaVA checkpoint.
        target: folder to create.
        weights: of the experts; a mapping writes one folder for each name.

    Returns:
        The folders that were written.

    Raises:
        ValueError: the folder cannot be read or converted, the weights do not fit, or `target` exists.
    """
    check_new(target, [source])
    stored = read_parts(source)
    experts = {part.router: part.experts for part in stored.parts}
    choices = weights if isinstance(weights, Mapping) else {"": weights}
    with new_path(target, [source]) as made:
        for name, choice in choices.items():
            folder = made / files.check_name(name) if name else made
            folder.mkdir(parents=True)
            chosen = vectors(_for_routers(choice, experts), experts)
            lora = plain_lora(stored.parts, chosen)
            config = files.config_values(lora, lora.layers, stored.base, stored.task_type)
            kind = choice if isinstance(choice, str) else "given"
            record = {"weights": kind, "experts": {key: value.tolist() for key, value in chosen.items()}, "error": None}
            files.write(folder, lora, config, record)
    return [target / name if name else target for name in choices]


def _for_routers(choice: Any, experts: Mapping[str, int]) -> Any:
    """Weights for the routers; what has one expert takes 1."""
    if choice is None or isinstance(choice, str | Mapping) or all(count > 1 for count in experts.values()):
        return choice
    routed = {name: count for name, count in experts.items() if count > 1}
    found = vectors(choice, routed) if routed else {}
    return {name: found[name].tolist() if name in found else [1.0] for name in experts}


def convert_measured(
    source: Path, target: Path, base: str, records: Path, by: str, clusters: int, max_length: int
) -> list[LoraExport]:
    """Write the mean routing over records as plain LoRA, with its error on them.

    Args:
        source: folder of an adapter.
        target: folder to create.
        base: model that it was trained on.
        records: file of records, as for `hydralora.finetune`.
        by: `whole`, `task` (their `task_type`) or `cluster`.
        clusters: number of clusters.
        max_length: longest record in tokens.

    Raises:
        ValueError: files cannot be read, or as of `hydralora.save_as_lora`.
        FileExistsError: `target` exists.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_new(target, [source, records])
    rows = read_samples(records)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), source).eval()
    tasks: dict[str, list[dict[str, Tensor]]] = {}
    for example in tokenize(rows, tokenizer, max_length):
        tasks.setdefault(str(example.task), []).append({"input_ids": torch.tensor([example.input_ids])})
    inputs = [batch for batches in tasks.values() for batch in batches]
    if by == "task":
        return list(save_tasks_as_lora(model, target, inputs=tasks).values())
    if by == "cluster":
        return save_clusters_as_lora(model, target, clusters, inputs)
    return [save_as_lora(model, target, MEAN, inputs=inputs)]
