"""Which class reads which language model, found by `model_type` and `architectures` in its `config.json`.

"llava", upstream's first name for every LLaVA, says nothing of the language model: there `architectures` decides, or
the names of the weights if there is none. What contradicts is refused.

A further backbone is one file with three short classes and one line here; see `docs/architecture.md`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llava.errors import CheckpointError
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen2 import LlavaQwen2ForCausalLM
from llava.model.language_model.llava_qwen3 import LlavaQwen3ForCausalLM
from llava.model.settings import VISION_KEYS
from llava.runtime.files import read_json, reading
from llava.runtime.program import errors_only
from llava.runtime.weights.settings import check_language_model, check_settings
from llava.runtime.weights.weight_files import named_weights

CONFIG_FILE = "config.json"
HF_TYPES = ("llava", "llava_next")
"""Model types of transformers' own format, whose `config.json` has a `text_config`."""

NEEDED_WITH_TOWER = ("mm_hidden_size", "mm_vision_select_layer")
"""What a LLaVA's `config.json` must say where it names a tower; since v1.5 the aspect ratio of images too."""

CLASSES: tuple[type[LlavaForCausalLM], ...] = (
    LlavaLlamaForCausalLM,
    LlavaMistralForCausalLM,
    LlavaQwen2ForCausalLM,
    LlavaQwen3ForCausalLM,
)


ALIASES = {"llava_qwen": LlavaQwen2ForCausalLM}
"""Model types of other programs: LLaVA-NeXT's for Qwen1.5 and Qwen2."""

ARCHITECTURE_ALIASES = {"LlavaQwenForCausalLM": LlavaQwen2ForCausalLM, "LLaMAForCausalLM": LlavaLlamaForCausalLM}
"""Names of classes in other programs: LLaVA-NeXT's, and that of the first conversions of Llama."""

UNTOLD = "llava"
"""Model type of upstream's first releases, and of LLaVA-NeXT's, whatever their language model."""


def _architectures() -> dict[str, type[LlavaForCausalLM]]:
    """Class by the names that `architectures` may have: of the LLaVA, and of its language model."""
    names = {name: cls for cls in CLASSES for name in (cls.__name__, cls.__bases__[-1].__name__)}
    return names | ARCHITECTURE_ALIASES


def _model_types() -> dict[str, type[LlavaForCausalLM]]:
    """Class by model type, of LLaVAs and of the plain language models that they are made from."""
    types: dict[str, type[LlavaForCausalLM]] = dict(ALIASES)
    for cls in CLASSES:
        types[cls.config_class.model_type] = cls
        types[cls.config_class.__base__.model_type] = cls
    return types


def backbone_class(name_or_path: str | Path, cache_dir: str | None = None) -> type[LlavaForCausalLM]:
    """The class for a folder or hub id of a language model or a LLaVA.

    Raises:
        CheckpointError: `config.json` is missing, names another kind of model, or contradicts itself.
    """
    own = Path(name_or_path) / CONFIG_FILE
    if own.is_file():
        read_json(own)  # whose messages name the file
    try:
        content, _ = PreTrainedConfig.get_config_dict(name_or_path, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name_or_path}: its config.json cannot be read: {error}") from error
    if not content:
        raise CheckpointError(f"{name_or_path}: holds no config.json, so it is no language model")
    kind, types = content.get("model_type"), _model_types()
    if "text_config" in content and kind in HF_TYPES:
        raise CheckpointError(
            f"{name_or_path}: is a LLaVA in transformers' own format; turn it into ours first: "
            "python -m llava.convert from-hf FOLDER OUTPUT"
        )
    where = own if own.is_file() else name_or_path
    named = _named_class(content.get("architectures"), where)
    if kind == UNTOLD:
        return named or _class_by_weights(name_or_path, content, cache_dir, where)
    if not isinstance(kind, str) or kind not in types:
        raise CheckpointError(
            f"{where}: the model type in its config.json is {kind!r}; backbones here are {sorted(types)}"
        )
    if named not in (None, types[kind]):
        raise CheckpointError(
            f"{where}: contradicts itself: its model_type is '{kind}', but its architectures are "
            f"{content['architectures']}; correct the one that the weights do not belong to"
        )
    return types[kind]


def _named_class(architectures: Any, where: str | Path) -> type[LlavaForCausalLM] | None:
    """The class that `architectures` names; None if it names none that is known.

    Raises:
        CheckpointError: it is not a list of names, or names classes of two kinds.
    """
    names = [] if architectures is None else architectures
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: its 'architectures' is {architectures!r:.80}, expected a list of names")
    known = _architectures()
    found = list(dict.fromkeys(known[name] for name in names if name in known))
    if len(found) > 1:
        raise CheckpointError(f"{where}: its architectures {names} are of several kinds; leave the one of the weights")
    return found[0] if found else None


def _class_by_weights(
    name_or_path: str | Path, content: Mapping[str, Any], cache_dir: str | None, where: str | Path
) -> type[LlavaForCausalLM]:
    """The class of a "llava" without known architectures: by the weights that only one language model has.

    Llama and Mistral have the same weights, and compute the same without a sliding window.

    Raises:
        CheckpointError: `architectures` names a class that is not known here.
    """
    if content.get("architectures"):
        raise CheckpointError(
            f"{where}: its architectures are {content['architectures']}; known here are {sorted(_architectures())}"
        )
    last = {".".join(name.split(".")[-2:]) for name in named_weights(name_or_path, cache_dir)[1]}
    if "q_norm.weight" in last:
        return LlavaQwen3ForCausalLM
    if "q_proj.bias" in last and "o_proj.bias" not in last:
        return LlavaQwen2ForCausalLM
    return LlavaLlamaForCausalLM if content.get("sliding_window") is None else LlavaMistralForCausalLM


def load_config(name_or_path: str | Path, cache_dir: str | None = None) -> Any:
    """The LLaVA configuration of a folder or hub id; that of a plain language model becomes one without vision.

    Raises:
        CheckpointError: as `backbone_class`.
    """
    config_class = backbone_class(name_or_path, cache_dir).config_class
    path = Path(name_or_path) / CONFIG_FILE
    if path.is_file():
        check_config(read_json(path), path)
    with errors_only(), reading(path):  # transformers would warn that the model type differs
        config = config_class.from_pretrained(name_or_path, cache_dir=cache_dir)
    config.model_type = config_class.model_type
    return config


def check_config(content: Mapping[str, Any], path: Path) -> None:
    """Refuse the `config.json` of a language model or LLaVA that lacks a setting or has an impossible one.

    Raises:
        CheckpointError: lists the settings.
    """
    check_language_model(content, path)
    check_settings(content, VISION_KEYS, path)
    if content.get("mm_vision_tower") is not None:
        names = NEEDED_WITH_TOWER + (("image_aspect_ratio",) if "mm_projector_type" in content else ())
        needed = {name: dataclasses.replace(VISION_KEYS[name], required=True) for name in names}
        check_settings(content, needed, path)
