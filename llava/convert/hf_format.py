"""Configuration and weights in transformers' own formats (`LlavaForConditionalGeneration`, `LlavaNext...`), and back.

The two hold the same modules under other names. What that format has no place for is kept in its `config.json` under
`llava_extensions`, so that a round trip gives back the very checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers import LlavaConfig as HfConfig

from llava.data.tiling import parse_grid_pinpoints
from llava.errors import CheckpointError, FlagError
from llava.model.language_model.backbones import CLASSES
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.multimodal_encoder.identity import DIGEST
from llava.model.multimodal_encoder.transformers_tower import TransformersTower

SETTINGS_KEY = "llava_extensions"
"""Key of what only we need to know."""

PREFIXES = (
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.", "model.vision_tower."),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
"""Beginnings of names here and there; the first that fits counts."""

HfModel = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
MODELS = {HfConfig: LlavaForConditionalGeneration, LlavaNextConfig: LlavaNextForConditionalGeneration}
"""Transformers' model by its configuration: images as one tile each, or as tiles of any resolution (LLaVA-NeXT)."""

NEXT = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
"""Settings of a LLaVA that LLaVA-NeXT of transformers expresses: it always cuts, unpads and ends rows of tiles."""

DERIVED = ("mm_vision_select_layer", "mm_vision_select_feature", "mm_hidden_size", "mm_projector_type")
"""Recorded settings that follow from the rest of `config.json` as well."""

TABLES = ("lm_head.weight", "model.embed_tokens.weight")

_NOT_RECORDED = frozenset(
    {"model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "extensions", DIGEST}
)


def to_hf_name(name: str) -> str:
    """Name of a weight in transformers' format."""
    ours, theirs = next(pair for pair in PREFIXES if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def from_hf_name(name: str) -> str:
    """Name of a weight here.

    Raises:
        CheckpointError: there is no such weight here.
    """
    for ours, theirs in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise CheckpointError(f"the weight '{name}' belongs to no part of a LLaVA")


def refuse_extensions(names: list[str]) -> None:
    """Refuse a checkpoint with extensions.

    Raises:
        FlagError: there are any.
    """
    if names:
        raise FlagError(
            f"the checkpoint holds the extension(s) {names}, and transformers' LLaVA has no such modules. What depends "
            "on the token (a router chooses) cannot be merged into its weights; for the rest an extension may have a "
            "program, which its README names: merge first, then convert what that wrote"
        )


def check_convertible(model: LlavaForCausalLM) -> None:
    """Refuse what transformers' LLaVA cannot express.

    Raises:
        FlagError: names the part and the reason.
    """
    refuse_extensions(sorted(model.extensions.configs))
    tower, config = model.get_vision_tower(), model.config
    if tower is None:
        raise FlagError("the checkpoint has no vision tower; a plain language model needs no conversion")
    if not isinstance(tower, TransformersTower):
        raise FlagError(
            f"'{tower.vision_tower_name}' is a tower of open_clip, whose network transformers does not have"
        )
    if tower.interval is not None:
        raise FlagError(f"mm_vision_select_feature {tower.select_feature}: transformers' LLaVA has no such features")
    if config.mm_projector_type != "mlp2x_gelu":
        raise FlagError(f"mm_projector_type {config.mm_projector_type}: transformers' LLaVA has mlp2x_gelu alone")
    merge_type = getattr(config, "mm_patch_merge_type", "flat")
    aspect_ratio = getattr(config, "image_aspect_ratio", None)
    if is_next(config):
        if tower.num_features != tower.num_patches:
            raise FlagError(f"mm_vision_select_feature {tower.select_feature}: tiles with a class token are not merged")
    elif merge_type != "flat" or aspect_ratio == "anyres":
        raise FlagError(
            f"image_aspect_ratio {aspect_ratio} with mm_patch_merge_type {merge_type}: transformers has LLaVA with one "
            f"tile for an image (flat), and LLaVA-NeXT with {NEXT}"
        )


def is_next(config: Any) -> bool:
    """Whether the counterpart of a LLaVA's configuration is LLaVA-NeXT."""
    return all(getattr(config, name, None) == value for name, value in NEXT.items())


def swapped(pinpoints: Any) -> list[list[int]]:
    """Resolutions as (height, width) of those as (width, height), and back: transformers has the first."""
    return [[second, first] for first, second in parse_grid_pinpoints(pinpoints)]


def hf_config(model: LlavaForCausalLM, image_token: int, record: dict[str, Any]) -> HfConfig | LlavaNextConfig:
    """Configuration for the weights of `model`, with room for the image token.

    Args:
        model: passed by `check_convertible`.
        image_token: id of `<image>`.
        record: kept beside the settings of the LLaVA.
    """
    tower, ours = model.get_vision_tower(), model.config.to_dict()
    text_class = type(model).config_class.__base__
    known = text_class().to_dict()
    text = text_class(**{key: value for key, value in ours.items() if key in known and key not in _NOT_RECORDED})
    text.vocab_size = max(model.config.vocab_size, image_token + 1)
    vision = type(tower.loaded().config).from_dict(tower.loaded().config.to_dict())
    keeps_all_rows = tower.select_feature == "cls_patch" or not tower.shape.class_token
    settings = {key: value for key, value in ours.items() if key not in known and key not in _NOT_RECORDED}
    tiles = {"image_grid_pinpoints": swapped(model.config.image_grid_pinpoints)} if is_next(model.config) else {}
    return (LlavaNextConfig if tiles else HfConfig)(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=tower.num_features,
        vision_feature_layer=tower.select_layer,
        vision_feature_select_strategy="full" if keeps_all_rows else "default",
        **tiles,
        **{SETTINGS_KEY: {"settings": settings, "vocab_size": model.config.vocab_size} | record},
    )


@torch.no_grad()
def hf_model(model: LlavaForCausalLM, config: HfConfig | LlavaNextConfig, dtype: torch.dtype) -> HfModel:
    """Transformers' model around the weights of ours; they are shared where the dtype is the same.

    The row of the image token is the mean of all others; generation never gives it.
    """
    size = config.text_config.vocab_size
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = tensor
        if name in TABLES and len(value) < size:
            mean = value.float().mean(dim=0).to(value.dtype)  # (D,)
            value = torch.cat([value, mean.expand(size - len(value), -1)])  # (vocabulary, D)
        tensors[to_hf_name(name)] = value.to(dtype)
    config.dtype = dtype
    with torch.device("meta"):
        result = MODELS[type(config)](config)
    result.load_state_dict(tensors, assign=True)
    result.tie_weights()
    given = model.generation_config
    ids = {name: getattr(given, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    result.generation_config = GenerationConfig(**ids, suppress_tokens=[config.image_token_index])
    return result


def our_config(
    config: HfConfig | LlavaNextConfig, select_feature: str, vocab_size: int, aspect_ratio: str, path: Path
) -> Any:
    """Configuration of a LLaVA here.

    Args:
        config: of transformers' model.
        select_feature: `patch` or `cls_patch`.
        vocab_size: rows of the embedding table.
        aspect_ratio: how its image processor treats images.
        path: the file that `config` was read from.

    Raises:
        CheckpointError: the model has parts that we do not have, or what `to-hf` recorded says something else.
    """
    # Parts that no LLaVA here has.
    text = config.text_config
    classes = {cls.config_class.__base__.model_type: cls.config_class for cls in CLASSES}
    if text.model_type not in classes:
        raise CheckpointError(
            f"{path}: its language model is a '{text.model_type}'; backbones here are {sorted(classes)}"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise CheckpointError(
            f"{path}: it joins the features of several layers ({config.vision_feature_layer}); we take one"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise CheckpointError(f"{path}: its projector is no mlp2x_gelu (another activation, or no biases)")
    # The language model's settings, and what such a model says of images under our names.
    known = type(text)().to_dict()
    settings = {key: value for key, value in text.to_dict().items() if key in known and key not in _NOT_RECORDED}
    vision = {
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": select_feature,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": aspect_ratio,
    }
    if isinstance(config, LlavaNextConfig):
        vision |= NEXT | {"image_grid_pinpoints": swapped(config.image_grid_pinpoints)}
    # Settings that `to-hf` recorded hold, unless somebody changed the model since.
    recorded = getattr(config, SETTINGS_KEY, {}).get("settings", {})
    derived: tuple[str, ...] = DERIVED
    if isinstance(config, LlavaNextConfig):
        derived = (*DERIVED, *NEXT, "image_grid_pinpoints")
        if "image_grid_pinpoints" in recorded:  # perhaps as text
            pinpoints = swapped(swapped(recorded["image_grid_pinpoints"]))
            recorded = recorded | {"image_grid_pinpoints": pinpoints}
    differing = [name for name in derived if recorded.get(name, vision[name]) != vision[name]]
    if differing:
        raise CheckpointError(
            f"{path}: {differing} are {[recorded[name] for name in differing]} in '{SETTINGS_KEY}' and "
            f"{[vision[name] for name in differing]} by the rest of the file"
        )
    ours = classes[text.model_type](**(settings | vision | recorded | {"vocab_size": vocab_size}))
    ours.architectures = [next(cls.__name__ for cls in CLASSES if cls.config_class is type(ours))]
    return ours


def our_tensors(model: HfModel, vocab_size: int) -> dict[str, Tensor]:
    """Weights under our names, the rows behind the vocabulary cut off."""
    tensors = {from_hf_name(name): tensor for name, tensor in model.state_dict().items()}
    return {name: value[:vocab_size].clone() if name in TABLES else value for name, value in tensors.items()}
