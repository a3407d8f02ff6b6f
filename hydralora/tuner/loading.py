"""A stored adapter and its configuration: a folder of PEFT, or one of the original HydraLoRA."""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import PeftConfig, PeftModel
from torch import nn

from hydralora.tuner.original import import_adapter, is_original, read_original_config
from llava.runtime.weights.base_weights import read_ends


def read_config(folder: Path) -> PeftConfig:
    """The configuration of the adapter in a folder, of whatever method of PEFT.

    Raises:
        ValueError: the folder holds no adapter, or one of the original that cannot be carried out here.
    """
    return read_original_config(folder) if is_original(folder) else PeftConfig.from_pretrained(str(folder))


def load_adapter(base: nn.Module, folder: Path, is_trainable: bool = False) -> PeftModel:
    """The base with the adapter of a folder, of whatever method of PEFT.

    Args:
        base: model that the adapter was trained on; generation ends where its answers end, too.
        folder: what `save_pretrained` or the original's program wrote; told apart by `adapter_config.json`.
        is_trainable: load it to go on training it.

    Raises:
        ValueError: the folder holds no adapter, or one of the original that cannot be carried out here.
    """
    if not is_original(folder):
        if getattr(base, "generation_config", None) is not None:
            read_ends(base.generation_config, folder)
        return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "adapter"
        import_adapter(folder, converted)
        return PeftModel.from_pretrained(base, str(converted), is_trainable=is_trainable)
