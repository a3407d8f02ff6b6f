"""The functions that the edited lines of `train.py` and `builder.py` call, for all extensions beside this file.

Flags become a base class of upstream's `TrainingArguments`; modules are attached right after PEFT has wrapped the
model, since PEFT freezes what it does not know; a checkpoint is recognised by its files, whatever its folder's name is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_patch.payload import adapters
from moe_patch.payload.extension import Extension, State
from moe_patch.payload.folders import Folder, is_projector, read_folder, write_ours
from moe_patch.payload.saving import (
    Collect,
    CompleteCheckpoints,
    NumbersOfExtensions,
    bare_model,
    copy_tensors,
    let_frozen_be_missing,
    saved_state,
)

GLUE = {"hydralora": "HydraLora", "mma": "Mma", "dynamic": "Dynamic"}
"""Every extension that there is: its class in the module `<name>_glue`, which is here if the extension was chosen."""


def _carried() -> tuple[Extension, ...]:
    here = Path(__file__).parent
    names = [name for name in GLUE if (here / f"{name}_glue.py").is_file()]
    return tuple(getattr(importlib.import_module(f"{__package__}.{name}_glue"), GLUE[name])() for name in names)


CARRIED = _carried()

Flags: type = dataclasses.make_dataclass("Flags", [], bases=tuple(extension.options for extension in CARRIED))
"""The flags of all extensions, as a dataclass."""


def configure(model_args: Any, training_args: Any) -> None:
    """Check the flags of all extensions and set those of upstream that follow from them.

    Raises:
        ValueError: a flag is contradictory or not carried out.
    """
    for extension in CARRIED:
        extension.configure(model_args, training_args)


def choose_lora_modules(lora_config: Any, model: Any, training_args: Any) -> None:
    """Let the flags of the extensions say which layers of the decoder get LoRA; upstream takes all linear layers."""
    for extension in CARRIED:
        names = extension.lora_modules(training_args)
        if names is not None:
            lora_config.target_modules = adapters.target_pattern(model, names)


def attach(model: Any, training_args: Any) -> None:
    """Put the modules of the extensions into a model that PEFT has wrapped."""
    for extension in CARRIED:
        extension.attach_for_training(bare_model(model), training_args)


def attach_beside_tower(model: Any, training_args: Any) -> None:
    """Put in what needs the vision tower, once that is loaded."""
    for extension in CARRIED:
        extension.attach_beside_tower(bare_model(model), training_args)


def prepare_trainer(trainer: Any, collect: Collect) -> None:
    """If an extension is switched on, log its numbers; beside LoRA, make every `checkpoint-N` complete."""
    if not any(extension.is_active(trainer.args) for extension in CARRIED):
        return
    for extension in CARRIED:
        extension.prepare_trainer(trainer)
    # In front, so that the callbacks that print see what it adds to the log line.
    trainer.callback_handler.callbacks.insert(0, NumbersOfExtensions(CARRIED))
    if trainer.args.lora_enable:
        trainer.callback_handler.callbacks.insert(0, CompleteCheckpoints(CARRIED, collect))
        if trainer.args.deepspeed:
            let_frozen_be_missing(trainer.model)


def save(model: Any, training_args: Any, state: State) -> State:
    """At the end of a run: write the extensions' settings, and give their tensors the names of the original layouts.

    Args:
        model: wrapped by PEFT.
        training_args: with `output_dir`.
        state: what upstream is about to write as `non_lora_trainables.bin`.
    """
    if training_args.should_save:
        for extension in CARRIED:
            extension.write_settings(bare_model(model), training_args, Path(training_args.output_dir))
    return saved_state(CARRIED, model, state)


def writes_itself(training_args: Any) -> bool:
    """True if an extension is trained without LoRA: then its weights and the projector are the whole result."""
    return any(extension.writes_itself(training_args) for extension in CARRIED)


def write(model: Any, training_args: Any, collect: Collect) -> None:
    """At the end of such a run: write the folder in the layout of llava-extensions.

    Raises:
        ValueError: something is trained that belongs to no extension.
    """
    state = collect(model.named_parameters())
    if not training_args.should_save:
        return
    parts = {e.name: (config, e.to_ours(model, state)) for e in CARRIED if (config := e.own_config(model)) is not None}
    projector = {name: tensor for name, tensor in state.items() if is_projector(name)}
    if len(state) != len(projector) + sum(len(tensors) for _, tensors in parts.values()):
        raise ValueError(
            f"{training_args.output_dir}: not written, since more is trained than extensions and projector"
        )
    write_ours(Path(training_args.output_dir), model.config, parts, projector)


def model_name(model_path: str, model_base: str | None, name: str) -> str:
    """The name by which upstream's loader chooses its way: of a folder with extensions one that means LLaVA.

    Raises:
        ValueError: the folder needs a base and none is given, or the other way round.
    """
    global _last
    _last = None  # the folder may have been written anew since it was loaded the last time
    folder = _local(model_path, model_base)
    found = None if folder is None else _read(folder)
    if found is None:
        return name
    if found.is_whole and model_base is not None:
        raise ValueError(f"{model_path}: holds the weights of the whole model; leave out model_base ({model_base})")
    if found.is_whole:
        return name if "llava" in name.lower() else f"llava-{name}"
    if model_base is None:
        raise ValueError(f"{model_path}: holds only what was trained on top of a base model; give it as model_base")
    return name if "llava" in name.lower() and "lora" in name.lower() else f"llava-lora-{name}"


def carries(model_path: str, model_base: str | None) -> bool:
    """True if the folder holds an extension, or was written by llava-extensions."""
    folder = _local(model_path, model_base)
    return folder is not None and _read(folder) is not None


def load(model_class: Any, model_path: str, model_base: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """Tokenizer and model of such a folder, with LoRA merged; tower and image tokens are left to upstream's loader.

    Args:
        model_class: `LlavaLlamaForCausalLM`.
        model_path: the folder, or its id on a model hub.
        model_base: the base weights; None for a folder with the weights of the whole model.
        options: for `from_pretrained`.

    Raises:
        ValueError: the folder is damaged or does not fit the base.
    """
    from transformers import AutoTokenizer

    path = _local(model_path, model_base)
    folder = None if path is None else _read(path)
    if folder is None:
        raise ValueError(f"{model_path}: holds no extension")
    base = str(folder.path) if model_base is None else model_base
    config = model_class.config_class.from_pretrained(folder.path)
    config.vocab_size = model_class.config_class.from_pretrained(base).vocab_size  # new tokens come later
    _older_rope(config)
    for extension in CARRIED:
        if extension.name in folder.extensions:
            extension.refuse(config)
    tokenizer = AutoTokenizer.from_pretrained(base, use_fast=False)
    attached = tuple(extension for extension in CARRIED if extension.name in folder.extensions)
    with _expected(model_class, [pattern for extension in attached for pattern in extension.weights_of_its_own]):
        model = model_class.from_pretrained(base, low_cpu_mem_usage=True, config=config, **options)
    for extension in attached:
        extension.attach(model, *folder.extensions[extension.name])
        extension.take_tokenizer(model, tokenizer)
    copy_tensors(model, folder.projector, folder.path)
    return tokenizer, adapters.merge_adapter(model, folder.path).eval()


@contextlib.contextmanager
def _expected(model_class: Any, patterns: list[str]) -> Iterator[None]:
    """Let transformers not warn of weights that the extensions read themselves."""
    before = model_class._keys_to_ignore_on_load_unexpected
    model_class._keys_to_ignore_on_load_unexpected = [*(before or []), *patterns]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = before


def _older_rope(config: Any) -> None:
    """Rotary settings that transformers 5 has written, where transformers 4 looks for them.

    Raises:
        ValueError: they are of a kind that this reading does not cover.
    """
    settings = dict(getattr(config, "rope_parameters", None) or {})
    kind = settings.pop("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rotary embeddings of the kind '{kind}', written by a later transformers, are not read here")
    if "rope_theta" in settings:
        config.rope_theta = settings["rope_theta"]


def _local(model_path: str, model_base: str | None) -> Path | None:
    """The folder of a checkpoint; one of adapters that is named by its id on a model hub is fetched."""
    if Path(model_path).is_dir():
        return Path(model_path)
    if model_base is None:
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_path))


_last: tuple[Path, Folder | None] | None = None


def _read(path: Path) -> Folder | None:
    """What the folder holds; the loader asks three times, and the file is read once."""
    global _last
    if _last is None or _last[0] != path:
        _last = path, read_folder(path, CARRIED)
    return _last[1]
