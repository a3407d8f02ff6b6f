"""From a `.pth` file of the original to a checkpoint folder, and back; the program is `mma/lavin/convert.py`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.data.trained_template import record_template
from llava.errors import CheckpointError
from llava.model.checkpoint import copy_tensors, read_extensions, save_checkpoint
from llava.model.components import Component, components
from llava.model.formats import inspect_checkpoint, read_json, read_projector
from llava.model.language_model.backbones import backbone_class, load_config
from llava.runtime.files import reading
from llava.runtime.hub import local_folder
from llava.runtime.output import check_new, new_path
from llava.runtime.run_record import RUN_FILE
from llava.runtime.tokenizer import load_tokenizer
from llava.runtime.weights.fingerprint import weights_fingerprint
from llava.runtime.weights.tensors import check_numbers
from llava.train.build import record_settings
from llava.train.options import DataArguments, ModelArguments, RunArguments, TrainingArguments
from mma import original as convert
from mma.config import TOWER, MmaConfig
from mma.extension import IMAGE_FLAGS, MmaExtension

MAX_LENGTH = 511
"""Longest sequence of the published adapters' training, 512 with the modality token."""


def skeleton(source: str | Path, config: Any, model_args: Any = None, near: Sequence[str | Path] = ()) -> Any:
    """A LLaVA whose language model takes no memory, with tower and projector in the main memory.

    Args:
        source: folder of a base or checkpoint, for the kind of backbone.
        config: of the LLaVA.
        model_args: options that say which tower and projector to make; None if `config` has them.
        near: folders searched for the tower.
    """
    with torch.device("meta"):
        model = backbone_class(source)(config)
    decoder = model.get_model()
    if model_args is None:
        decoder.load_vision_tower(near)
        decoder.mm_projector = decoder.mm_projector.to_empty(device="cpu")
    else:
        decoder.initialize_vision_modules(model_args, near)
    return model


def attach(model: Any, config: MmaConfig) -> None:
    """Attach adapters to a skeleton, in the main memory."""
    model.extensions.attach(model, MmaExtension(), config.to_dict())
    for name, parameter in model.extensions.named_parameters(model).items():
        parent, _, attribute = name.rpartition(".")
        held = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), requires_grad=False)
        setattr(model.get_submodule(parent), attribute, held)


def import_file(
    file: str | Path,
    output: str | Path,
    base: str | Path,
    vision_tower: str | None = None,
    defaults: Mapping[str, float] | None = None,
    **settings: float | None,
) -> Path:
    """Write a checkpoint folder from a file of the original.

    Args:
        file: `{'model': tensors, ...}`.
        output: folder to write.
        base: folder or hub id of the language model, in transformers' layout.
        vision_tower: folder or hub id; None: `TOWER`.
        defaults: see `convert.config_of`.
        settings: `adapter_scale` and `temperature`; None takes what the file says, or the default.

    Returns:
        The folder written. It appears whole or not at all.

    Raises:
        CheckpointError: the file is damaged, or does not fit base and tower; or `output` exists.
    """
    check_new(output, [file, base, vision_tower])
    file, base = Path(file), str(local_folder(str(base)))
    with reading(file, "its tensors are not those of LaVIN's adapters"):
        original = convert.read(file)
        check_numbers({k: v for k, v in original.tensors.items() if not k.endswith("attention.gate")}, file)
        config = convert.config_of(original, file, defaults, **settings)
        hidden = convert.hidden_proj(original, file)
    tower = vision_tower or TOWER
    args = _arguments(base, tower, hidden)
    tokenizer = load_tokenizer(base, model_max_length=MAX_LENGTH)
    model = skeleton(base, load_config(base), args.model, [base])
    attach(model, config)
    record_settings(model, args, tokenizer)
    record_template(model.config, None, tokenizer)  # LaVIN's prompts are none of ours, nor that of the base
    try:
        tensors = convert.from_original(original, model, file)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    idle = convert.idle_names(original, model)
    if idle:
        print(f"{file}: {len(idle)} tensors that no answer depends on are left out (first: {sorted(idle)[0]})")
    parameters = dict(model.named_parameters())
    copy_tensors({name: parameters[name] for name in tensors}, tensors, file)
    model.requires_grad_(False)
    with new_path(output, [file, base, vision_tower]) as folder:
        save_checkpoint(model, folder, tokenizer)
        record = {
            "arguments": {"model": {"model_name_or_path": base, "vision_tower": tower}},
            "imported_from": {
                "file": file.name,
                "fingerprint": weights_fingerprint(file),
                "settings": original.settings,
            },
        }
        (folder / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Path(output)


def ready_folder(
    file: str | Path,
    base: str | Path,
    vision_tower: str | None = None,
    defaults: Mapping[str, float] | None = None,
    **settings: float | None,
) -> Path:
    """The checkpoint folder of a file of the original, `NAME-llava` beside it; written if it is not there.

    Arguments and errors as of `import_file`; what is None and has no default fits any folder that is there.

    Raises:
        CheckpointError: the folder was written from a file with other content, or for another base or tower, or with
            other settings.
    """
    file = Path(file)
    folder = file.with_name(f"{file.stem}-llava")
    if not folder.exists():
        return import_file(file, folder, base, vision_tower, defaults, **settings)
    record = read_json(folder / RUN_FILE)
    source, model = record.get("imported_from"), record["arguments"]["model"]
    config = read_json(folder / "extensions" / MmaExtension.name / "config.json")
    said = source["settings"] if isinstance(source, dict) else {}
    given = {name: value for name, value in settings.items() if value is not None}
    wanted = {**(defaults or {}), **said, **given}
    other = [f"with {name} {config[name]}" for name, value in wanted.items() if value != config[name]]
    if model["model_name_or_path"] != str(local_folder(str(base))):
        other.append(f"with base {model['model_name_or_path']}")
    if vision_tower not in (None, model.get("vision_tower")):
        other.append(f"with tower {model.get('vision_tower')}")
    if not isinstance(source, dict) or source["fingerprint"] != weights_fingerprint(file):
        other.append(f"from other content than {file.name} has now")
    if other:
        raise CheckpointError(f"{folder}: was written {', '.join(other)}; delete it or rename it, or pass the same")
    return folder


def _arguments(base: str, vision_tower: str, hidden: int) -> RunArguments:
    """Options of the run of ours that would have led to such a checkpoint."""
    flags = {name: value for name, (part, _, value) in IMAGE_FLAGS.items() if part == "model"}
    model = ModelArguments(
        model_name_or_path=base,
        version="plain",
        vision_tower=vision_tower,
        mm_projector_type=f"bottleneck{hidden}_silu",
        mm_use_im_patch_token=False,
        **flags,
    )
    data = DataArguments(image_aspect_ratio=IMAGE_FLAGS["image_aspect_ratio"][2])
    return RunArguments(model, data, TrainingArguments(output_dir="unused", use_cpu=True, report_to="none"))


def export_file(checkpoint: str | Path, output: str | Path) -> Path:
    """Write a file of the original from a checkpoint folder.

    Args:
        checkpoint: folder with adapters and the projector of six class tokens.
        output: file to write.

    Returns:
        The file written.

    Raises:
        CheckpointError: the folder holds more or other things than the original knows; or `output` exists.
    """
    check_new(output, [checkpoint], file=True)
    contents = inspect_checkpoint(checkpoint)
    trained_with = read_extensions(contents)
    others = sorted(set(trained_with) - {MmaExtension.name})
    foreign = others or contents.adapter is not None or contents.tower is not None
    if MmaExtension.name not in trained_with or foreign or contents.projector is None:
        raise CheckpointError(
            f"{checkpoint}: the original's file holds adapters and projector of LaVIN and nothing else; this folder "
            f"has the extensions {sorted(trained_with)}{', a LoRA adapter' if contents.adapter else ''}"
            f"{', a trained vision tower' if contents.tower else ''}"
            f"{'' if contents.projector else ', no trained projector'}"
        )
    values, tensors = trained_with[MmaExtension.name]
    config = MmaConfig.from_dict(values)
    model = skeleton(contents.folder, load_config(contents.folder), near=[contents.folder])
    attach(model, config)
    copy_tensors(components(model)[Component.EXTENSION], tensors, contents.extensions[MmaExtension.name])
    copy_tensors(components(model)[Component.PROJECTOR], read_projector(contents.projector), contents.projector)
    names = convert.original_names(model)
    if set(components(model)[Component.PROJECTOR]) - set(names):
        raise CheckpointError(
            f"{checkpoint}: was trained with --visual_input llava, and LaVIN has no place for its projector "
            f"({model.config.mm_projector_type})"
        )
    content = convert.to_original(model, dict(model.named_parameters())) | {
        convert.RUN: argparse.Namespace(**{name: getattr(config, name) for name in convert.SETTINGS})
    }
    with new_path(output, [checkpoint], file=True) as path:
        torch.save(content, path)
    return Path(output)
