"""How rows would be trained on: from the options of `llava.data.check`, the base and the tower, to settings.

What a LLaVA records of images holds unless a flag is given, as in a training run (`llava/train/base_settings.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import CLIPImageProcessorPil

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN
from llava.data.image_bounds import check_made
from llava.data.inspection import Settings
from llava.data.templates import select_template
from llava.data.tiling import ImageLength, check_grid_pinpoints
from llava.data.trained_template import trained_template, version_of_conv_mode
from llava.errors import CheckpointError, FlagError
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.runtime.files import read_json
from llava.runtime.hub import local_folder
from llava.runtime.tokenizer import load_tokenizer

CONFIG_FILE = "config.json"

DEFAULTS: dict[str, tuple[Any, Any]] = {
    "image_aspect_ratio": ("square", "pad"),
    "image_grid_pinpoints": (None, None),
    "mm_patch_merge_type": ("flat", "flat"),
    "mm_use_im_start_end": (False, False),
    "mm_vision_select_feature": ("patch", "patch"),
    "mm_vision_select_layer": (-1, -1),
}
"""Options that a LLaVA records: what one means that lacks them, and what is taken for a base that is not a LLaVA."""


CLIP_LARGE = (576, 336)
"""Patches and side in pixels of LLaVA-1.5's tower; taken where neither base nor flag names a tower."""


@dataclass(frozen=True)
class TowerSizes:
    """What a tower makes of an image.

    Attributes:
        features: rows that one image or tile takes in the sequence.
        side: of an image or tile in pixels.
        image_processor: of the tower.
        named: False if no tower is named, so that these are the sizes of LLaVA-1.5's.
    """

    features: int
    side: int
    image_processor: Any
    named: bool = True


def _square_processor(side: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def tower_sizes(args: argparse.Namespace, base: Mapping[str, Any]) -> TowerSizes:
    """What the tower of a run makes of an image, from its settings; no weights are read.

    Args:
        args: of `llava.data.check`, filled in; `--image_length` and `--tile_size` win over the tower's.
        base: `config.json` of the base.

    Raises:
        CheckpointError: the tower is not there, or is of an unknown kind.
        FlagError: the tower has no such layer or feature.
    """
    length, side = args.image_length, args.tile_size
    name = args.vision_tower or base.get("mm_vision_tower")
    if length is not None and side is not None:
        return TowerSizes(length, side, _square_processor(side))
    if name is None:
        features, pixels = length or CLIP_LARGE[0], side or CLIP_LARGE[1]
        return TowerSizes(features, pixels, _square_processor(pixels), named=False)
    config = SimpleNamespace(
        mm_vision_tower=name,
        mm_vision_select_layer=args.mm_vision_select_layer,
        mm_vision_select_feature=args.mm_vision_select_feature,
    )
    try:
        tower = build_vision_tower(config, [args.model_name_or_path])
        processor = tower.read_image_processor()
    except CheckpointError as error:
        # The side in pixels decides on tiles alone, so the length is enough for images that are taken whole.
        if length is not None and not args.vision_tower and not args.image_aspect_ratio.startswith("anyres"):
            pixels = side or CLIP_LARGE[1]
            return TowerSizes(length, pixels, _square_processor(pixels))
        raise CheckpointError(
            f"{error}\nHow long an image is depends on the tower: pass --vision_tower FOLDER, or --image_length and "
            "--tile_size"
        ) from error
    return TowerSizes(length or tower.num_features, side or tower.image_size, processor)


def _version_of(model: str) -> str:
    """The template that a run on a model takes where none is given."""
    trained = trained_template(model)
    return "v1" if trained is None else version_of_conv_mode(trained.name)


def _fill_in(args: argparse.Namespace) -> dict[str, Any]:
    """Give options that were not given the values that a run on the base would take; its `config.json`."""
    args.version = args.version or _version_of(args.model_name_or_path)
    path = local_folder(args.model_name_or_path, (CONFIG_FILE,)) / CONFIG_FILE
    config = read_json(path) if path.is_file() else {}
    is_llava = config.get("mm_vision_tower") is not None
    for name, (of_llava, of_other) in DEFAULTS.items():
        if getattr(args, name) is None:
            stored = config.get(name) if is_llava else None
            setattr(args, name, stored if stored is not None else of_llava if is_llava else of_other)
    return config


def settings_of(args: argparse.Namespace) -> Settings:
    """How the data would be trained on; options that were not given are filled in.

    Args:
        args: of `llava.data.check`.

    Raises:
        FlagError: the template is not known, or a folder does not exist.
        CheckpointError: the tokenizer is missing, or the base's `config.json` is damaged.
    """
    if args.image_folder is not None and not Path(args.image_folder).is_dir():
        raise FlagError(f"--image_folder {args.image_folder}: no such folder")
    config = _fill_in(args)
    at_least = {"model_max_length": 1, "image_length": 1, "tile_size": 1, "num_workers": 0, "samples": 0, "show": 0}
    for name, least in at_least.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise FlagError(f"--{name} {getattr(args, name)}: must be at least {least}")
    tower = tower_sizes(args, config)
    args.image_length, args.tile_size, args.tower_is_named = tower.features, tower.side, tower.named
    tokenizer = load_tokenizer(args.model_name_or_path, model_max_length=args.model_max_length)
    if args.mm_use_im_start_end:
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    return Settings(
        template=select_template(args.version, tokenizer),
        tokenizer=tokenizer,
        image_folder=args.image_folder,
        image_length=_image_length(args),
        max_length=args.model_max_length,
        mm_use_im_start_end=args.mm_use_im_start_end,
        read_images=not args.skip_images,
        check_size=partial(
            check_made,
            image_processor=tower.image_processor,
            aspect_ratio=args.image_aspect_ratio,
            grid_pinpoints=args.image_grid_pinpoints,
        ),
    )


def _image_length(args: argparse.Namespace) -> ImageLength:
    if args.image_aspect_ratio != "anyres":
        return ImageLength(args.image_length)
    resolutions = check_grid_pinpoints(args.image_grid_pinpoints, args.tile_size)
    return ImageLength(args.image_length, args.mm_patch_merge_type, resolutions, args.tile_size)
