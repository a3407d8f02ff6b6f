"""Writing a checkpoint in upstream's layout, for programs that read only that.

`python -m llava.convert to-original` is the program. LoRA folders get `non_lora_trainables.bin` next to the adapter;
full weights are copied; extensions add what their original code wrote (MLLM-HydraLoRA: `moe_args.pth`; Dynamic-LLaVA:
predictors among the weights).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from llava.data.trained_template import template_settings
from llava.errors import CheckpointError, FlagError
from llava.extension import installed_extensions
from llava.model.builder import base_folder
from llava.model.checkpoint import load_trained
from llava.model.formats import NON_LORA_FILE, CheckpointContents, inspect_checkpoint, read_projector, read_tensors
from llava.model.language_model.backbones import backbone_class, load_config
from llava.model.multimodal_encoder.stored import is_stored_tower
from llava.runtime.files import read_json
from llava.runtime.output import check_new, new_path
from llava.runtime.program import errors_only
from llava.runtime.weights.adapter_counts import check_lora
from llava.runtime.weights.base_weights import read_base
from llava.runtime.weights.completeness import FILE_LIST
from llava.runtime.weights.settings import LORA, check_settings
from llava.runtime.weights.tensors import check_dtype, check_finite, check_numbers
from llava.runtime.weights.weight_files import described_weights, weight_files

PEFT_PREFIX = "base_model.model."


def _export_adapter(contents: CheckpointContents, output: Path) -> None:
    """Adapter weights as they are; target modules as upstream writes them, by their last names."""
    # The keys of a LoRA file are PEFT's format: `<layer>.lora_A.weight`.
    tensors, path = read_tensors(contents.adapter), contents.folder / "adapter_config.json"
    check_numbers(tensors, contents.adapter)
    values = read_json(path)
    check_settings(values, LORA, path)
    check_lora(tensors, values["r"], contents.adapter)
    shutil.copyfile(contents.adapter, output / contents.adapter.name)
    config = read_json(contents.folder / "adapter_config.json")
    layers = {name.split(".lora_")[0] for name in tensors}
    config["target_modules"] = sorted({layer.rpartition(".")[2] for layer in layers})
    (output / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_extensions(contents: CheckpointContents) -> None:
    """Ask each extension whether its original has a layout for what it does here.

    Raises:
        FlagError: one says that it has none.
    """
    available = installed_extensions(list(contents.extensions))
    for name, folder in contents.extensions.items():
        problem = available[name].export_problem(read_json(folder / "config.json"))
        if problem is not None:
            raise FlagError(f"{contents.folder}: cannot be exported with its extension '{name}': {problem}")


def _export_extensions(contents: CheckpointContents, base: str, output: Path) -> None:
    """Let each extension write what its original code would have written."""
    config = load_config(contents.folder)
    config.vocab_size = load_config(base).vocab_size
    with errors_only():  # a tower among the weights stays where it is
        model, _ = read_base(backbone_class(contents.folder), base, config, is_stored_tower, dtype=torch.float32)
    available = installed_extensions(list(contents.extensions))
    for name, folder in contents.extensions.items():
        model.extensions.attach(model, available[name], read_json(folder / "config.json"))
    without_adapter = CheckpointContents(**{**vars(contents), "adapter": None})
    load_trained(model, without_adapter)
    for item in model.extensions:
        item.extension.export_checkpoint(model, item.config, output)


def _export_adapter_folder(contents: CheckpointContents, output: Path) -> None:
    """LoRA and what is trained beside it."""
    _export_adapter(contents, output)
    trained = {} if contents.projector is None else read_projector(contents.projector)
    torch.save({PEFT_PREFIX + name: tensor for name, tensor in trained.items()}, output / NON_LORA_FILE)


def _export_full_weights(contents: CheckpointContents, output: Path) -> None:
    """Everything but what is our own: weights, tokenizer, generation defaults."""
    ours = {"config.json", "run.json", "trainer_state.json", "training_args.bin", SCHEDULER_NAME, OPTIMIZER_NAME}
    ours.add(FILE_LIST)
    weights = set(weight_files(contents.weights))
    for name, entry in described_weights(contents.weights).items():
        check_dtype(name, entry.dtype, entry.path)
        check_finite(name, entry.read(name), entry.path)
    for path in contents.folder.iterdir():
        is_kept = path.suffix in (".json", ".model", ".txt", ".jinja") and path.name not in ours
        if path.is_file() and (is_kept or path in weights):
            shutil.copyfile(path, output / path.name)


def _refuse(contents: CheckpointContents) -> None:
    """Raise for what upstream's layout has no place for."""
    checkpoint = contents.folder
    _check_extensions(contents)
    if contents.adapter is None and contents.weights is None:
        raise CheckpointError(
            f"{checkpoint}: holds neither a LoRA adapter nor full weights; upstream's layout has no other place for "
            f"{sorted(contents.extensions) or 'what it holds'}"
        )
    if contents.adapter is None and not contents.extensions:
        raise CheckpointError(f"{checkpoint}: holds no LoRA adapter; full weights are in upstream's layout already")
    if contents.adapter is not None and read_json(checkpoint / "config.json").get("mm_use_im_start_end"):
        raise CheckpointError(
            f"{checkpoint}: was trained with mm_use_im_start_end, and upstream's LoRA layout has no place for the rows "
            "of those tokens; merge the checkpoint with its base instead"
        )
    if contents.tower is not None:
        raise CheckpointError(
            f"{checkpoint}: has a vision tower of its own ({contents.tower}), which this layout is not written with; "
            "python -m llava.convert to-hf and llava.model.consolidate carry it along"
        )


def export_original(checkpoint: str | Path, output: str | Path, model_base: str | None = None) -> Path:
    """Write a LoRA checkpoint, or full weights with extensions, in upstream's layout.

    Args:
        checkpoint: folder in our layout.
        output: folder to write.
        model_base: base of the checkpoint, where it is not the recorded one.

    Returns:
        The folder written. It appears whole or not at all.

    Raises:
        CheckpointError: upstream's layout has no place for what the folder holds, or `output` exists already.
        FlagError: an extension has no original layout for what it does in this checkpoint.
    """
    check_new(output, [checkpoint, model_base])
    contents = inspect_checkpoint(checkpoint)
    _refuse(contents)
    with new_path(output, [checkpoint, model_base]) as folder:
        folder.mkdir()
        config = read_json(contents.folder / "config.json")
        config.pop("extensions", None)
        config |= template_settings(contents.folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if contents.adapter is not None:
            _export_adapter_folder(contents, folder)
        else:
            _export_full_weights(contents, folder)
        if contents.extensions:
            base = base_folder(contents, model_base) if contents.needs_base else str(contents.folder)
            _export_extensions(contents, str(base), folder)
    return Path(output)
