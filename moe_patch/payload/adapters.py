"""LoRA by PEFT: which layers get it in training, and reading adapters that a later PEFT has written."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

ADAPTER_CONFIG = "adapter_config.json"
WITHOUT_EFFECT = frozenset(
    {"peft_version", "qalora_group_size", "megatron_core", "runtime_config", "eva_config", "corda_config", "revision"}
)
"""Settings of later versions of PEFT that change nothing by themselves, whatever their value is."""


def decoder_linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the decoder's blocks by their full name in the bare model."""
    layers = model.get_decoder().layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return {f"{prefix}.{name}": m for name, m in layers.named_modules() if isinstance(m, nn.Linear)}


def target_pattern(model: Any, wanted: list[str]) -> str:
    """What `target_modules` of PEFT has to be so that layers of these last names in the decoder, and no others, match.

    Raises:
        ValueError: the decoder has no layer of a name; the message lists those it has.
    """
    names = decoder_linears(model)
    available = sorted({name.rpartition(".")[2] for name in names})
    unknown = sorted(set(wanted) - set(available))
    if unknown:
        raise ValueError(f"--lora_modules names {unknown}; the decoder has {available}")
    chosen = [name for name in names if name.rpartition(".")[2] in wanted]
    shapes = sorted({re.sub(r"\\?\.\d+\\?\.", r"\\.\\d+\\.", re.escape(name), count=1) for name in chosen})
    return "|".join(f"({shape})" for shape in shapes)


def merge_adapter(model: Any, folder: Path) -> Any:
    """Put the LoRA of a folder into a bare model and merge it; the model as it is if the folder has none.

    Raises:
        ValueError: the adapter uses what this PEFT does not know, or its weights do not fit the model.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return model
    from peft import get_peft_model, set_peft_model_state_dict

    config = _config(folder / ADAPTER_CONFIG)
    wrapped = get_peft_model(model, config)
    tensors = _weights(folder)
    # PEFT's names of weights in a file lack the adapter's name, which stands before the last part.
    expected = {
        name.replace(".default.", "."): weight.shape for name, weight in wrapped.named_parameters() if "lora_" in name
    }
    wrong = sorted(
        name for name in {*expected, *tensors} if expected.get(name) != getattr(tensors.get(name), "shape", None)
    )
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} LoRA weights are missing, unknown or of another shape: {wrong[:3]}")
    set_peft_model_state_dict(wrapped, tensors)
    return wrapped.merge_and_unload()


def _config(path: Path) -> Any:
    """`LoraConfig` of a file, without settings that only a later PEFT knows."""
    from peft import LoraConfig

    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path}: a {values.get('peft_type')} adapter; only LoRA can be loaded here")
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    unknown = {name: value for name, value in values.items() if name not in known and value}
    lost = sorted(set(unknown) - WITHOUT_EFFECT)
    if lost:
        raise ValueError(f"{path}: uses {lost}, which the installed PEFT does not have")
    values = {name: value for name, value in values.items() if name in known}
    values.update(inference_mode=False, base_model_name_or_path=None)
    return LoraConfig(**values)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "adapter_model.safetensors"
    if path.is_file():
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
