"""Writing a loaded LLaVA as full weights: what merging LoRA and `consolidate` have in common."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from llava.errors import CheckpointError, FlagError
from llava.model.builder import base_folder, load_pretrained_model
from llava.model.components import Component, components
from llava.model.formats import TOWER_FOLDER, inspect_checkpoint
from llava.model.generation_defaults import mend_generation_config
from llava.runtime.files import read_json
from llava.runtime.output import check_new, new_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_full_weights(checkpoint: str | Path, output: str | Path, model_base: str | None = None) -> Path:
    """Load a checkpoint, merge its LoRA in fp32, and write a folder that needs no base.

    Args:
        checkpoint: full weights, or LoRA or a projector on top of a base.
        output: folder to write.
        model_base: base of the checkpoint, where it is not the recorded one.

    Returns:
        The folder written, in the dtype of the base. It appears whole or not at all.

    Raises:
        CheckpointError: the checkpoint cannot be read, or `output` exists already.
        FlagError: the checkpoint holds extensions, which no plain weights can express.
    """
    check_new(output, [checkpoint, model_base])
    contents = inspect_checkpoint(checkpoint)
    if contents.extensions:
        raise FlagError(
            f"{checkpoint}: holds the extensions {sorted(contents.extensions)}, which plain weights cannot express; "
            "load it with its base instead"
        )
    base = base_folder(contents, model_base)
    dtype = _stored_dtype(Path(base or contents.folder))
    with new_path(output, [checkpoint, base]) as folder:
        tokenizer, model, _, _ = load_pretrained_model(str(checkpoint), base, device="cpu", torch_dtype=torch.float32)
        if model.extensions.configs:
            raise FlagError(
                f"{checkpoint}: holds the extensions {sorted(model.extensions.configs)}; they cannot be merged"
            )
        mend_generation_config(model, str(base or checkpoint))
        parts = components(model)
        weights = parts[Component.LANGUAGE_MODEL] | parts[Component.PROJECTOR]
        model.to(dtype)
        config = copy.deepcopy(model.config)
        config.architectures, config.use_cache, config.dtype = [type(model).__name__], True, dtype
        model.save_pretrained(folder, state_dict={name: weight.detach() for name, weight in weights.items()})
        tower = model.get_vision_tower()
        if contents.tower is not None:
            shutil.copytree(contents.tower, folder / TOWER_FOLDER)
        elif tower is not None and tower.is_from_elsewhere():
            tower.save(folder / TOWER_FOLDER, dict(tower.loaded().to(dtype).named_parameters()))
            config.mm_vision_tower = TOWER_FOLDER
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(output)


def _stored_dtype(folder: Path) -> torch.dtype:
    """Dtype that a `config.json` names; fp32 if it names none, or the weights lie on a model hub."""
    if not (folder / "config.json").is_file():
        return torch.float32
    content: dict[str, Any] = read_json(folder / "config.json")
    name = str(content.get("dtype") or content.get("torch_dtype") or "float32")
    if name not in DTYPES:
        raise CheckpointError(f"{folder}: its config.json says that its weights are {name}; known: {sorted(DTYPES)}")
    return DTYPES[name]
