"""Which class reads which language model, found by the `model_type` of its `config.json`.

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

CONFIG_FILE = "config.json"
NEEDED_WITH_TOWER = ("mm_hidden_size", "mm_vision_select_layer")
"""What a LLaVA's `config.json` must say where it names a tower; since v1.5 the aspect ratio of images too."""

CLASSES: tuple[type[LlavaForCausalLM], ...] = (
    LlavaLlamaForCausalLM,
    LlavaMistralForCausalLM,
    LlavaQwen2ForCausalLM,
    LlavaQwen3ForCausalLM,
)


def _model_types() -> dict[str, type[LlavaForCausalLM]]:
    """Class by model type, of LLaVAs and of the plain language models that they are made from."""
    types: dict[str, type[LlavaForCausalLM]] = {}
    for cls in CLASSES:
        types[cls.config_class.model_type] = cls
        types[cls.config_class.__base__.model_type] = cls
    return types


def backbone_class(name_or_path: str | Path, cache_dir: str | None = None) -> type[LlavaForCausalLM]:
    """The class for a folder or hub id of a language model or a LLaVA.

    Raises:
        CheckpointError: `config.json` is missing or names another kind of model.
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
    if kind == "llava":
        if "text_config" in content:
            raise CheckpointError(
                f"{name_or_path}: is a LLaVA in transformers' own format; turn it into ours first: "
                "python -m llava.convert from-hf FOLDER OUTPUT"
            )
        kind = LlavaLlamaForCausalLM.config_class.model_type  # what upstream called it at first
    if not isinstance(kind, str) or kind not in types:
        raise CheckpointError(
            f"{own if own.is_file() else name_or_path}: the model type in its config.json is {kind!r}; backbones here "
            f"are {sorted(types)}"
        )
    return types[kind]


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
