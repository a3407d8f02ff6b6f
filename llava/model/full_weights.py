"""Writing a loaded LLaVA as full weights: what merging LoRA and `consolidate` have in common."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch

from llava.errors import FlagError
from llava.model.builder import base_folder, load_pretrained_model, refuse_adapted
from llava.model.components import Component, components
from llava.model.formats import TOWER_FOLDER, inspect_checkpoint
from llava.model.generation_defaults import mend_generation_config
from llava.model.multimodal_encoder.identity import weights_digest
from llava.model.stored_dtype import stored_dtype
from llava.model.tower_record import is_own, record_carried, record_named
from llava.runtime.hub import local_folder
from llava.runtime.output import check_new, new_path


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
    contents = inspect_checkpoint(local_folder(checkpoint))
    if contents.extensions:
        raise FlagError(
            f"{checkpoint}: holds the extensions {sorted(contents.extensions)}, which plain weights cannot express; "
            "load it with its base instead"
        )
    base = base_folder(contents, model_base)
    base = None if base is None else str(local_folder(base))
    dtype = stored_dtype(base or contents.folder)
    with new_path(output, [checkpoint, base]) as folder:
        tokenizer, model, _, _ = load_pretrained_model(
            str(contents.folder), base, device="cpu", torch_dtype=torch.float32
        )
        if model.extensions.configs:
            raise FlagError(
                f"{checkpoint}: holds the extensions {sorted(model.extensions.configs)}; they cannot be merged"
            )
        refuse_adapted(model, contents)
        mend_generation_config(model, str(base or checkpoint))
        parts = components(model)
        weights = parts[Component.LANGUAGE_MODEL] | parts[Component.PROJECTOR]
        tower = model.get_vision_tower()
        if tower is not None and tower.digest is None:
            tower.digest = weights_digest(tower.loaded(), tower.optional_weights(tower.loaded()))
        model.to(dtype)
        config = copy.deepcopy(model.config)
        config.architectures, config.use_cache, config.dtype = [type(model).__name__], True, dtype
        model.save_pretrained(folder, state_dict={name: weight.detach() for name, weight in weights.items()})
        if tower is not None and tower.stored is None and is_own(tower):  # of the checkpoint or of its base
            shutil.copytree(tower.vision_tower_name, folder / TOWER_FOLDER)
            record_carried(config, tower)
        elif tower is not None and is_own(tower):
            tower.save(folder / TOWER_FOLDER, dict(tower.loaded().to(dtype).named_parameters()))
            record_carried(config, tower)
        else:
            record_named(config, tower, alone=True)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(output)
