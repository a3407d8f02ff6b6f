"""Writing and reading what a run has trained: one complete folder per checkpoint (layout: `docs/architecture.md`).

`save_checkpoint` and `load_trained` are inverse to each other; evaluation, resuming and tests all go through them.
The folder says by its files what was trained, so nothing has to be remembered elsewhere.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.extension import Config
from llava.model.components import Component, components
from llava.model.formats import (
    EXTENSIONS_FOLDER,
    IMAGE_TOKENS_FILE,
    TOWER_FOLDER,
    CheckpointContents,
    inspect_checkpoint,
    projector_tensors,
    read_projector,
    read_tensors,
    strip_peft_prefix,
)
from llava.model.image_tokens import image_token_rows, load_image_tokens
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.multimodal_encoder.stored import fill, is_stored_tower, stored_tower
from llava.model.tower_record import is_own, record_carried, record_named
from llava.runtime.files import read_json
from llava.runtime.partition import assign, fetch, full_shape, shared_like
from llava.runtime.weights.adapter_counts import check_adapter
from llava.runtime.weights.completeness import write_file_list
from llava.runtime.weights.tensors import check_numbers, is_finite
from llava.runtime.weights.weight_files import weight_files


def bare_model(model: nn.Module) -> LlavaForCausalLM:
    """The LLaVA model itself, whatever PEFT wrapped around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def _portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: what safetensors accepts, without storage shared between entries."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


@dataclass
class _Trained:
    """Whole tensors of everything that is trained, by their names in the files."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    projector: dict[str, Tensor] = field(default_factory=dict)
    tower: dict[str, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)
    image_tokens: dict[str, Tensor] = field(default_factory=dict)
    extensions: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def check_finite(self, folder: Path) -> None:
        """Refuse to write what is no number.

        Raises:
            CheckpointError: names the tensor.
        """
        parts = (self.weights, self.projector, self.tower, self.adapter, self.image_tokens)
        for part in (*parts, *self.extensions.values()):
            for name, tensor in part.items():
                if not is_finite(tensor):
                    raise CheckpointError(f"{folder}: not written, because '{name}' holds NaN or infinite values")


def _collect(model: nn.Module, keep: bool) -> _Trained:
    """Fetch what is trained; collective where parameters are split (see `partition`)."""
    llava, parts = bare_model(model), components(model)
    trained = {part for part, named in parts.items() if any(weight.requires_grad for weight in named.values())}
    found = _Trained()
    if Component.LANGUAGE_MODEL in trained:
        found.weights = fetch(parts[Component.LANGUAGE_MODEL] | parts[Component.PROJECTOR], keep)
    elif Component.PROJECTOR in trained or llava.get_model().has_new_projector:
        found.projector = fetch(parts[Component.PROJECTOR], keep)
    if Component.LANGUAGE_MODEL not in trained:
        found.image_tokens = image_token_rows(llava, keep)
    tower = llava.get_vision_tower()
    if Component.VISION_TOWER in trained or (Component.LANGUAGE_MODEL in trained and is_own(tower)):
        own = {id(weight) for weight in parts[Component.VISION_TOWER].values()}  # and not what extensions added
        network = tower.loaded()
        found.tower = fetch({name: weight for name, weight in network.named_parameters() if id(weight) in own}, keep)
    if isinstance(model, PeftModel):
        adapter = {id(weight) for weight in parts[Component.ADAPTER].values()}
        # Under every name that it has: some methods share one tensor among the layers, and save it once.
        every = model.named_parameters(remove_duplicate=False)
        tensors = fetch({name: weight for name, weight in every if id(weight) in adapter}, keep)
        kept = model.state_dict().keys()  # frozen projections of some methods are buffers; others are computed again
        buffers = {name: each for name, each in model.named_buffers(remove_duplicate=False) if name in kept}
        tensors = buffers | tensors
        if keep:
            found.adapter = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    for item in llava.extensions:
        own = dict(item.extension.named_parameters(llava, item.config))
        found.extensions[item.extension.name] = fetch(own, keep)
    return found


def save_checkpoint(model: nn.Module, folder: str | Path, tokenizer: Any = None, write: bool = True) -> None:
    """Write everything that is trained, with all that is needed to load it again.

    A language model that is trained itself is written in full; otherwise only adapters, projector and extensions. A
    frozen projector is written too if it is not that of the base, and with full weights a frozen tower that only a
    checkpoint has. Other towers are named, with a digest.

    Args:
        model: LLaVA model or the PEFT model around it.
        folder: created if missing.
        tokenizer: written along if given.
        write: False on processes that only take part in gathering split parameters.

    Raises:
        CheckpointError: a trained tensor holds NaN or infinite values; nothing has been written then.
    """
    folder = Path(folder)
    found = _collect(model, keep=write)
    if not write:
        return
    found.check_finite(folder)
    folder.mkdir(parents=True, exist_ok=True)
    llava = bare_model(model)
    config = copy.deepcopy(llava.config)
    config.architectures = [type(llava).__name__]
    config.extensions = llava.extensions.configs
    config.use_cache = True
    if hasattr(config, "quantization_config"):  # of this run's base in memory; no weights in the folder are quantised
        del config.quantization_config
    if found.weights:
        llava.save_pretrained(folder, state_dict=found.weights)
    else:  # what ends an answer is part of what was trained
        llava.generation_config.save_pretrained(folder)
    if found.projector:
        save_file(_portable(found.projector), folder / "mm_projector.safetensors", {"format": "pt"})
    if found.image_tokens:
        save_file(_portable(found.image_tokens), folder / IMAGE_TOKENS_FILE, {"format": "pt"})
    if found.tower:
        llava.get_vision_tower().save(folder / TOWER_FOLDER, found.tower)
        record_carried(config, llava.get_vision_tower())
    else:
        record_named(config, llava.get_vision_tower(), alone=bool(found.weights))
    if isinstance(model, PeftModel):
        save_file(_portable(found.adapter), folder / "adapter_model.safetensors", {"format": "pt"})
        model.active_peft_config.save_pretrained(folder)
    for item in llava.extensions:
        _write_extension(folder / EXTENSIONS_FOLDER / item.extension.name, item.config, found)
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_file_list(folder)


def _write_extension(target: Path, config: Config, found: _Trained) -> None:
    target.mkdir(parents=True, exist_ok=True)
    save_file(_portable(found.extensions[target.name]), target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_extensions(contents: CheckpointContents) -> dict[str, tuple[Config, dict[str, Tensor]]]:
    """Configuration and tensors of each extension in a folder of our own layout."""
    return {
        name: (read_json(path / "config.json"), read_tensors(path / "model.safetensors"))
        for name, path in contents.extensions.items()
    }


def load_extension_tensors(llava: LlavaForCausalLM, name: str, tensors: dict[str, Tensor], source: Path) -> None:
    """Fill the parameters of an attached extension.

    Raises:
        CheckpointError: names or shapes differ from those of the attached extension.
    """
    attached = {item.extension.name: item for item in llava.extensions}
    if name not in attached:
        raise CheckpointError(f"{source}: holds the extension '{name}', but the model has only {sorted(attached)}")
    parameters = dict(attached[name].extension.named_parameters(llava, attached[name].config))
    copy_tensors(parameters, tensors, source)


def copy_tensors(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], source: Path) -> None:
    """Copy tensors into parameters of exactly the same names and shapes, keeping dtype and device.

    Raises:
        CheckpointError: a name is missing or unknown, a shape differs, or a tensor is not of finite floating-point
            numbers; nothing has been copied then.
    """
    missing, unknown = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or unknown:
        raise CheckpointError(
            f"{source}: does not fit the model; {len(missing)} tensors are missing (first: {missing[:3]}), "
            f"{len(unknown)} are unknown (first: {unknown[:3]}); config.json and options "
            "say what the model is made of"
        )
    for name, parameter in parameters.items():
        expected = full_shape(parameter)
        if expected != tensors[name].shape:
            raise CheckpointError(
                f"{source}: '{name}' has shape {tuple(tensors[name].shape)}, the model expects {tuple(expected)}"
            )
        if not parameter.is_floating_point():
            raise CheckpointError(
                f"{source}: '{name}' is quantised in the model ({parameter.dtype}) and cannot be filled"
            )
    check_numbers({name: tensors[name] for name in parameters}, source)
    for name, parameter in parameters.items():
        assign(parameter, tensors[name])


def load_adapter(model: PeftModel, path: Path) -> None:
    """Fill the adapter of a PEFT model; errors as of `check_adapter`."""
    set_peft_model_state_dict(model, shared_like(check_adapter(model, path), model.parameters()))


def load_trained(model: nn.Module, checkpoint: str | Path | CheckpointContents) -> None:
    """Read into `model` all that a checkpoint of our own or of upstream's layout holds beside the base.

    Args:
        model: LLaVA model, or PEFT model if the folder has an adapter, with the folder's extensions attached.
        checkpoint: its folder, or what `inspect_checkpoint` found there.

    Raises:
        CheckpointError: a part is damaged or does not fit the model.
    """
    contents = checkpoint if isinstance(checkpoint, CheckpointContents) else inspect_checkpoint(checkpoint)
    llava = bare_model(model)
    parts = components(model)
    if contents.projector is not None:
        copy_tensors(parts[Component.PROJECTOR], read_projector(contents.projector), contents.projector)
    for path in filter(None, (contents.projector, contents.image_tokens)):
        load_image_tokens(llava, path)
    if contents.non_lora is not None:
        _load_non_lora(parts[Component.PROJECTOR], contents.non_lora)
    tower = llava.get_vision_tower()
    if contents.tower is not None and tower is not None:
        tower.load_weights(contents.tower)
    for name, (_, tensors) in read_extensions(contents).items():
        load_extension_tensors(llava, name, tensors, contents.extensions[name] / "model.safetensors")
    if contents.adapter is not None:
        if not isinstance(model, PeftModel):
            raise CheckpointError(
                f"{contents.adapter}: the run does not use adapters; give that run's flags (--lora_..., --peft_config)"
            )
        load_adapter(model, contents.adapter)


def _load_non_lora(projector: dict[str, nn.Parameter], path: Path) -> None:
    """Read the projector out of upstream's file; what extensions own in it is theirs to read."""
    tensors = projector_tensors(strip_peft_prefix(read_tensors(path)))
    if tensors:
        copy_tensors(projector, tensors, path)


def load_full_weights(llava: LlavaForCausalLM, contents: CheckpointContents) -> None:
    """Read full weights into an existing model, to resume a run that trains the language model itself.

    A tower among them is read too, unless the folder has one by itself, which `load_trained` reads.

    Raises:
        CheckpointError: names or shapes differ.
    """
    parts = components(llava)
    wanted = parts[Component.LANGUAGE_MODEL] | parts[Component.PROJECTOR]
    tensors: dict[str, Tensor] = {}
    for path in weight_files(contents.weights):
        tensors |= read_tensors(path)
    copy_tensors(wanted, {k: v for k, v in tensors.items() if not is_stored_tower(k)}, contents.folder)
    tower, stored = llava.get_vision_tower(), stored_tower(contents.folder)
    if stored is not None and tower is not None and contents.tower is None:
        network = tower.loaded()
        fill(network, stored, tower.used_names(network), tower.vision_tower_name)
