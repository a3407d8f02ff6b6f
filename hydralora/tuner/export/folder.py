"""A folder of PEFT's LoRA that servers take: whole or not there, with a configuration that all of them read alike.

vLLM, SGLang and llama.cpp's converter take rank and alpha for all layers from `adapter_config.json`, the layers from
the names of the tensors, and refuse or ignore patterns, DoRA, biases and modules that were trained in full.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hydralora.tuner.export.constant import PlainLora

CONFIG, TENSORS, RECORD = "adapter_config.json", "adapter_model.safetensors", "hydralora_export.json"
PREFIX = "base_model.model."
"""Of every name in a file of PEFT."""


def target_names(layers: Collection[str], modules: Iterable[str]) -> list[str]:
    """What `target_modules` is for these layers: their last names if these mean no other module, else full names.

    Args:
        layers: names of the adapted layers.
        modules: names of all modules of the model, the adapted ones included: PEFT compares names alone.
    """
    last = {name.rpartition(".")[2] for name in layers}
    meant = {name for name in modules if name.rpartition(".")[2] in last}
    return sorted(last if meant == set(layers) else layers)


def config_values(
    lora: PlainLora,
    targets: Collection[str],
    base: str | None = None,
    task_type: str | None = None,
    transposed: bool = False,
) -> dict[str, Any]:
    """`adapter_config.json`; `transposed`: all layers store weights as (in_features, out_features), as GPT-2's."""
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": sorted(targets),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def write(folder: Path, lora: PlainLora, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write tensors, configuration, and how the weights were chosen, into an empty folder."""
    tensors = {PREFIX + name: tensor for name, tensor in lora.tensors.items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    for name, values in ((CONFIG, config), (RECORD, record)):
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_name(name: object) -> str:
    """A name of a folder in another one.

    Raises:
        ValueError: it is empty, or a path.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or Path(name).name != name or "\0" in name:
        raise ValueError(f"{name!r} is not a name for a folder; use letters, digits, '-' and '_'")
    return name


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder that appears under the name `target` when the block ends well, and not at all otherwise.

    Raises:
        FileExistsError: `target` exists; it is left as it is.
    """
    target = Path(target)
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: already exists; choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:100]}.") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        yield made
        if os.path.lexists(target):  # it may have appeared meanwhile
            raise FileExistsError(f"{target}: already exists; choose another path")
        shutil.move(made, target)
