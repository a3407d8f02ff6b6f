"""The one way into a trained model, for evaluation, serving and tests (upstream `llava/model/builder.py`).

The kind of a checkpoint is found from its files. Read are: upstream full weights (one file or shards), upstream LoRA
folders, projector-only folders, folders of an extension's original code, and our own layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llava.data.trained_template import take_trained_template
from llava.errors import CheckpointError, FlagError
from llava.extension import Config, Extension, ImportedState, installed_extensions
from llava.model.checkpoint import load_extension_tensors, load_trained
from llava.model.components import Component, components
from llava.model.formats import (
    TOWER_FOLDER,
    CheckpointContents,
    inspect_checkpoint,
    projector_tensors,
    read_tensors,
    weight_file_names,
)
from llava.model.generation_defaults import add_trained_end
from llava.model.image_tokens import add_image_tokens, wanted_tokens
from llava.model.language_model.backbones import backbone_class, load_config
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.multimodal_encoder.stored import is_stored_tower, stored_tower
from llava.model.placement import keep_here, place_new_parts
from llava.runtime.files import naming, read_json, reading
from llava.runtime.hub import local_folder
from llava.runtime.offloading import is_offloaded, materialize
from llava.runtime.program import errors_only
from llava.runtime.quantization import choose_cpu_kernels, quantisation_config
from llava.runtime.tokenizer import load_tokenizer
from llava.runtime.weights.base_weights import read_base, read_ends
from llava.runtime.weights.run_file import latest
from llava.runtime.weights.settings import LORA, check_settings
from llava.runtime.weights.weight_files import check_base, weight_files

DEFAULT_CONTEXT_LENGTH = 2048


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[Any, LlavaForCausalLM, Any, int]:
    """Load a model ready for `generate`.

    Args:
        model_path: checkpoint folder, or its id on a model hub.
        model_base: folder or hub id of the base weights, where the checkpoint has none of its own.
        model_name: accepted as upstream has it; the format is found from the files instead.
        load_8bit: quantise the weights to 8 bits with bitsandbytes.
        load_4bit: quantise the weights to 4 bits (NF4) with bitsandbytes.
        device_map: placement of the weights on several GPUs, CPU and disk; used only when `device` is `cuda`. Layers on
            CPU or disk are brought in for each pass; what was trained on top of them stays on the device where they
            compute, and LoRA of such layers is not merged.
        device: `cuda` (placed by `device_map`), `cuda:1` or `cpu` (all of it there), or another torch device.
        use_flash_attn: use FlashAttention 2 instead of SDPA.
        kwargs: `torch_dtype` (or `dtype`) of base, tower and projector; default is fp16 on a GPU, fp32 on the CPU. What
            extensions have added stays in fp32 on every device, as in training. Others reach `from_pretrained`.

    Returns:
        Tokenizer, model in eval mode, image processor (None without a tower), context length in tokens.

    Raises:
        CheckpointError: the folder is incomplete, of an unknown kind, or does not fit the base.
        FlagError: contradictory arguments, a device map that cannot be used, or an extension that is not installed.
    """
    if load_8bit and load_4bit:
        raise FlagError("load_8bit and load_4bit exclude each other")
    # fp16 as upstream; fp32 on a CPU, where half precision is slow.
    place, quantised = torch.device(device), load_8bit or load_4bit
    on_gpu = place.type == "cuda"
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or (torch.float16 if on_gpu else torch.float32)
    # The files say what the checkpoint is; its name, by which upstream decides, may be anything.
    contents = inspect_checkpoint(local_folder(model_path))
    base = base_folder(contents, model_base)
    options = dict(kwargs, dtype=dtype)
    if use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    if quantised:
        options["quantization_config"] = quantisation_config(4 if load_4bit else 8, dtype)
    if on_gpu or quantised:  # without a map transformers quantises on the current GPU, whichever was asked for
        options["device_map"] = device_map if place == torch.device("cuda") else {"": str(place)}
    # Base and tokenizer first: everything that follows is checked against both, errors name the file at fault.
    config_file = contents.folder / "config.json"
    imported = _imported_states(contents)
    model, missing = _load_base(contents, base, options, _claimed(imported))
    if base is not None:
        read_ends(model.generation_config, contents.folder)
    tokenizer = load_tokenizer(_tokenizer_folder(contents, base))
    take_trained_template(model.config, tokenizer, contents.folder)
    add_trained_end(model, tokenizer)
    _check_vocabulary(model, tokenizer, Path(_tokenizer_folder(contents, base)))
    tokens = wanted_tokens(model.config)
    keep_here(model, bool(tokens))
    if tokens:
        _check_image_tokens(tokenizer, tokens, contents)
        add_image_tokens(model, tokenizer, tokens)
    near = [contents.folder, *([local_folder(base, (f"{TOWER_FOLDER}/*",))] if base else [])]
    image_processor = None
    stored = stored_tower(base or contents.folder) if contents.tower is None else None
    if getattr(model.config, "mm_vision_tower", None):  # a trained tower is read here, from inside the checkpoint
        with naming(config_file):
            image_processor = model.get_model().load_vision_tower(near, dtype, stored).image_processor
    elif stored is not None:
        raise CheckpointError(
            f"{stored.folder}: contains a vision tower in its weights, but {config_file} has no 'mm_vision_tower'"
        )
    # Extensions add their modules now; the weights are read below with the rest, into real memory.
    _attach_extensions(model, contents, imported)
    materialize(model, model.extensions.named_parameters(model))
    if "attn_implementation" in options:  # what was asked for; what an extension chose is needed for its losses
        model.config._attn_implementation = options["attn_implementation"]
    # LoRA is merged for speed, but not into quantized weights, which would round it away.
    model = _load_rest(model, contents, imported, missing, merge=not quantised)
    if load_4bit:
        choose_cpu_kernels(model, trained=False)
    if "device_map" in options:
        place_new_parts(model)
    else:  # the dtype is there already; a cast would round extensions and rotary frequencies too
        model.to(place)
    model.requires_grad_(False)
    context_length = getattr(model.config, "max_sequence_length", DEFAULT_CONTEXT_LENGTH)
    return tokenizer, model.eval(), image_processor, context_length


def _check_vocabulary(model: LlavaForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer whose texts begin or end with a token that the model has no embedding for.

    Raises:
        CheckpointError: names the token.
    """
    for name in ("bos_token", "eos_token"):
        index = getattr(tokenizer, f"{name}_id")
        if index is not None and index >= model.config.vocab_size:
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: {name} {getattr(tokenizer, name)!r} has the id {index}, but the "
                f"model has {model.config.vocab_size} embeddings"
            )


def _check_image_tokens(tokenizer: Any, tokens: list[str], contents: CheckpointContents) -> None:
    """Refuse a checkpoint whose tokenizer does not have the image tokens that were trained with it.

    Raises:
        CheckpointError: names them.
    """
    path = contents.folder / "tokenizer_config.json"
    if contents.image_tokens is None or not path.is_file():  # tokens are added to the tokenizer of the base
        return
    known, size = tokenizer.get_vocab(), read_json(contents.folder / "config.json")["vocab_size"]
    lacking = [token for token in tokens if known.get(token, size) >= size]  # transformers gives lost tokens new ids
    if lacking:
        raise CheckpointError(
            f"{path}: has no ids below {size} for {lacking}, whose embeddings are in {contents.image_tokens}"
        )


def base_folder(contents: CheckpointContents, model_base: str | None) -> str | None:
    """Folder or hub id of the base weights; None if the checkpoint has its own.

    Raises:
        CheckpointError: a base is needed, none is given, and the recorded one is not here.
    """
    if not contents.needs_base:
        return None
    if model_base is not None:
        return model_base
    recorded = None
    if contents.adapter is not None:
        recorded = read_json(contents.folder / "adapter_config.json").get("base_model_name_or_path")
    elif (contents.folder / "run.json").is_file():
        recorded = latest(read_json(contents.folder / "run.json"))["arguments"]["model"]["model_name_or_path"]
    if recorded and (Path(recorded) / "config.json").is_file():
        return recorded
    raise CheckpointError(
        f"{contents.folder}: holds only what was trained on top of a base model; give that base by --model-base"
        + (f" (recorded at training time: '{recorded}', which is no folder here)" if recorded else "")
    )


def _load_base(
    contents: CheckpointContents, base: str | None, options: dict[str, Any], claimed: Collection[str]
) -> tuple[LlavaForCausalLM, set[str]]:
    """The bare LLaVA with the base weights, and the names of the weights that these did not have.

    Of the weights there, the tower's and those that are `claimed` by extensions are read by others.
    """
    backbone, config = backbone_class(contents.folder), load_config(contents.folder)
    if base is None:
        weight_files(contents.weights)  # complains about missing shards by name
    else:
        check_base(base)
        if backbone_class(base) is not backbone:
            raise CheckpointError(
                f"{contents.folder}: was trained on a {config.model_type}, but the base {base} is a "
                f"{load_config(base).model_type}; give the base that it was trained on by --model-base"
            )
        config.vocab_size = load_config(base).vocab_size  # image tokens of the checkpoint get their rows later
    source = base or contents.folder
    with errors_only():  # weights that come from other files later are no news; what is missing then is an error
        return read_base(backbone, source, config, lambda name: is_stored_tower(name) or name in claimed, **options)


def _imported_states(contents: CheckpointContents) -> dict[str, ImportedState]:
    """What extensions read from a folder of an original layout, by their names."""
    if contents.extensions:
        return {}
    states = {name: each.import_checkpoint(contents.folder) for name, each in installed_extensions().items()}
    return {name: state for name, state in states.items() if state is not None}


def _claimed(imported: dict[str, ImportedState]) -> frozenset[str]:
    """Names of the tensors that belong to extensions."""
    return frozenset().union(*(state.claimed for state in imported.values()))


def _attach_extensions(
    model: LlavaForCausalLM, contents: CheckpointContents, imported: dict[str, ImportedState]
) -> None:
    """Attach what the checkpoint was trained with: of our own layout, or read from original layouts."""
    if contents.extensions:
        wanted = {name: read_json(path / "config.json") for name, path in contents.extensions.items()}
        available = installed_extensions(list(wanted))
        for name in _order(model.config, wanted):
            config_file = contents.extensions[name] / "config.json"
            _check_recorded(contents, available[name], wanted[name])
            with naming(config_file, CheckpointError), reading(config_file, "no extension of these settings fits"):
                model.extensions.attach(model, available[name], wanted[name])
    candidates = installed_extensions()
    for name, state in imported.items():
        model.extensions.attach(model, candidates[name], state.config)


def _check_recorded(contents: CheckpointContents, extension: Extension, config: Config) -> None:
    """Refuse an extension whose settings are not those that the checkpoint's `config.json` has of it.

    Raises:
        CheckpointError: names the settings.
    """
    path = contents.folder / "config.json"
    recorded = (read_json(path).get("extensions") or {}).get(extension.name, config)
    names = sorted((recorded.keys() | config.keys()) - extension.adjustable)
    differing = [name for name in names if recorded.get(name) != config.get(name)]
    if differing:
        values = ", ".join(f"{name} {config.get(name)!r} and {recorded.get(name)!r}" for name in differing[:3])
        raise CheckpointError(
            f"{contents.extensions[extension.name] / 'config.json'} and {path} differ about '{extension.name}': "
            f"{values}; one of the two was damaged or edited alone"
        )


def _order(config: Any, wanted: dict[str, Any]) -> list[str]:
    """Names in the order in which they were attached at training time."""
    recorded = [name for name in (getattr(config, "extensions", None) or {}) if name in wanted]
    return recorded + [name for name in wanted if name not in recorded]


def _load_rest(
    model: LlavaForCausalLM,
    contents: CheckpointContents,
    imported: dict[str, ImportedState],
    missing: set[str],
    merge: bool,
) -> LlavaForCausalLM:
    """Everything beside the base: projector, extensions, adapter. Adapters are merged where the base allows it."""
    for name, state in imported.items():
        load_extension_tensors(model, name, state.tensors, contents.folder)
    _check_claimed(contents, imported)
    host: nn.Module = model
    if contents.adapter is not None:
        adapter_config = contents.folder / "adapter_config.json"
        with reading(adapter_config, "no adapter can be made with these settings"):
            peft_config = PeftConfig.from_pretrained(str(contents.folder))
        if isinstance(peft_config, LoraConfig):
            check_settings(read_json(adapter_config), LORA, adapter_config)
        elif peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
            raise CheckpointError(f"{adapter_config}: '{peft_config.peft_type}' adapts no layers; it is not supported")
        peft_config.base_model_name_or_path = model.config.name_or_path  # where the base is now, not where it was
        with _without_tower(model), reading(adapter_config, "no adapter can be made with these settings"):
            host = get_peft_model(model, peft_config)
        elsewhere = _offloaded_adapters(model, contents)
        materialize(model, components(model)[Component.ADAPTER])
        merge = merge and not elsewhere  # a merged weight would have to be stored, where the base is stored now
    load_trained(host, dataclasses.replace(contents, tower=None))
    projector_read = contents.projector is not None or _has_projector(contents.non_lora)
    still_missing = missing - set(components(model)[Component.PROJECTOR]) if projector_read else missing
    if still_missing:
        base = Path(model.config.name_or_path)
        looked_in = [f"{base} ({weight_file_names(base)})" if base.is_dir() else base]
        looked_in += filter(None, (contents.projector, contents.non_lora))
        raise CheckpointError(
            f"{contents.folder}: {len(still_missing)} weights are missing (first: {sorted(still_missing)[:3]}) in "
            f"{', '.join(map(str, looked_in))}; is --model-base the base that it was trained on?"
        )
    if contents.adapter is None:
        return model
    return merged(host, contents) if merge else model


def merged(host: Any, contents: CheckpointContents) -> LlavaForCausalLM:
    """The bare model with the adapter in its weights; with the adapter as it is where the method cannot be merged.

    Raises:
        CheckpointError: merging failed half-way.
    """
    llava = host.get_base_model()
    layers = [module for module in llava.modules() if isinstance(module, BaseTunerLayer)]
    try:
        return host.merge_and_unload()
    except (NotImplementedError, AttributeError, ValueError) as error:  # routed by token, for example
        if any(layer.merged for layer in layers) or not all(module in set(llava.modules()) for module in layers):
            raise CheckpointError(f"{contents.adapter}: cannot be merged into its base ({error})") from error
        return llava


def refuse_adapted(model: nn.Module, contents: CheckpointContents) -> None:
    """Refuse a loaded model whose adapter is not in its weights, where plain weights are to be written.

    Raises:
        FlagError: names the method.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        method = read_json(contents.folder / "adapter_config.json").get("peft_type")
        raise FlagError(
            f"{contents.folder}: its {method} adapter cannot be merged into weights, because what it adds depends "
            "on the input; load it with its base instead"
        )


def _offloaded_adapters(model: LlavaForCausalLM, contents: CheckpointContents) -> list[str]:
    """Names of the adapted layers whose base weights are elsewhere between passes.

    Raises:
        CheckpointError: an adapter of such a layer needs the base weights themselves, as DoRA does.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    elsewhere = [name for name, layer in adapted.items() if is_offloaded(layer.get_base_layer())]
    refused = [name for name in elsewhere if not isinstance(adapted[name], LoraLayer) or adapted[name].lora_variant]
    if refused:
        raise CheckpointError(
            f"{contents.adapter}: is not plain LoRA and needs the weights of layers that the device map leaves on the "
            f"CPU or on disk: {', '.join(refused)}; give them a device, or load the model whole"
        )
    return elsewhere


@contextlib.contextmanager
def _without_tower(model: LlavaForCausalLM) -> Iterator[None]:
    """Keep the tower out of PEFT's sight: upstream's target modules are last names, some of which it has too."""
    decoder = model.get_model()
    tower, decoder.vision_tower = decoder.vision_tower, None
    try:
        yield
    finally:
        decoder.vision_tower = tower


def _check_claimed(contents: CheckpointContents, imported: dict[str, ImportedState]) -> None:
    """Everything in upstream's non-LoRA file must be somebody's: projector or an extension."""
    if contents.non_lora is None:
        return
    claimed = _claimed(imported)
    names = read_tensors(contents.non_lora)
    unknown = sorted(names.keys() - projector_tensors(names).keys() - claimed)
    if unknown:
        raise CheckpointError(
            f"{contents.non_lora}: {len(unknown)} of {len(names)} tensors belong to no installed extension (first: "
            f"{unknown[:3]}); install the package that they come from"
        )


def _has_projector(non_lora: Path | None) -> bool:
    """True if upstream's non-LoRA file contains a projector; without one, it is that of the base."""
    return non_lora is not None and bool(projector_tensors(read_tensors(non_lora)))


def _tokenizer_folder(contents: CheckpointContents, base: str | None) -> str:
    """The checkpoint's own tokenizer if it has one, else that of the base."""
    own = contents.folder / "tokenizer_config.json"
    return str(contents.folder) if own.is_file() or base is None else base
