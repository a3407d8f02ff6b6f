"""Finding and building the vision tower of a model (upstream `multimodal_encoder/builder.py`).

A tower named by a bare name is looked for inside the checkpoint folder, then beside it, then in the working folder;
only a name of the form `owner/model` may come from a model hub. Its kind follows from the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava.errors import CheckpointError, FlagError
from llava.model.formats import TOWER_MARKERS
from llava.model.multimodal_encoder import open_clip_encoder
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.open_clip_encoder import OpenClipVisionTower
from llava.model.multimodal_encoder.siglip_encoder import SiglipVisionTower
from llava.runtime.files import read_json, reading
from llava.runtime.hub import is_hub_id

KINDS: dict[str, type[VisionTower]] = {
    "clip": CLIPVisionTower,
    "clip_vision_model": CLIPVisionTower,
    "siglip": SiglipVisionTower,
    "siglip_vision_model": SiglipVisionTower,
}
"""Kind of tower by the `model_type` of its `config.json`."""

NORMALIZATIONS = {
    "tower": None,
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
"""Mean and deviation of the three colours by the values of `--mm_image_normalization`."""


def _places(name: str, near: Iterable[str | Path]) -> list[Path]:
    """Where a relative name is looked for."""
    places: list[Path] = []
    for folder in map(Path, near):
        places += [folder / name, folder.resolve().parent / name]
    return [*places, Path(name)]


def _searched(name: str, near: Iterable[str | Path], moved: bool) -> list[Path]:
    """As `_places`; of a path that has moved, its last part as well."""
    near, path = list(near), Path(name)
    return _places(name, near) + (_places(path.name, near)[:-1] if moved and path.is_absolute() else [])


def resolve_vision_tower(name: str, near: Iterable[str | Path] = (), moved: bool = False) -> str:
    """Path or hub id of a tower, or the `open_clip:` form with the path of its weights file resolved.

    Args:
        name: value of `--vision_tower` or of `mm_vision_tower` in a `config.json`.
        near: checkpoint folders in whose inside and neighbourhood a relative name is looked for.
        moved: look there for the last part of an absolute path too; for a tower whose weights are checked.

    Raises:
        CheckpointError: nothing of that name exists and the name is no hub id; lists the places searched.
        FlagError: an `open_clip:` name lacks a part.
    """
    return vision_tower_places(name, near, moved)[0]


def vision_tower_places(name: str, near: Iterable[str | Path] = (), moved: bool = False) -> list[str]:
    """Everything that `resolve_vision_tower` may mean, in its order; arguments and errors as there."""
    if name.startswith(open_clip_encoder.PREFIX):
        return _open_clip_places(name, near, moved)
    searched = _searched(name, near, moved)
    found = [path for path in searched if any((path / marker).is_file() for marker in TOWER_MARKERS)]
    if found:
        return list(dict.fromkeys(map(str, found)))
    if is_hub_id(name):
        return [name]
    places = "\n  ".join(str(path) for path in searched)
    raise CheckpointError(
        f"no vision tower '{name}': none of these folders holds one of {TOWER_MARKERS}\n  {places}\n"
        "Put the tower there or give its folder by --vision_tower."
    )


def _open_clip_places(name: str, near: Iterable[str | Path], moved: bool) -> list[str]:
    parts = open_clip_encoder.parse_name(name)
    if not parts.is_file:
        return [name]
    searched = _searched(parts.pretrained, near, moved)
    found = [f"{open_clip_encoder.PREFIX}{parts.architecture}/{path}" for path in searched if path.is_file()]
    if found:
        return list(dict.fromkeys(found))
    places = "\n  ".join(str(path) for path in searched)
    raise CheckpointError(f"no vision tower '{name}': there is no such weights file\n  {places}")


def tower_class(path: str) -> type[VisionTower]:
    """Kind of the tower at a resolved path.

    Raises:
        CheckpointError: the folder holds another kind of model.
    """
    if path.startswith(open_clip_encoder.PREFIX) or (Path(path) / open_clip_encoder.CONFIG_FILE).is_file():
        return OpenClipVisionTower
    own = Path(path) / "config.json"
    if own.is_file():
        read_json(own)  # whose messages name the file
    with reading(path, "its config.json cannot be read"):
        kind = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(
            f"{own if own.is_file() else path}: its config.json says model_type '{kind}'; a vision tower is one of "
            f"{sorted(KINDS)}, or a model of open_clip ({open_clip_encoder.PREFIX}ARCH/PRETRAINED)"
        )
    return KINDS[kind]


def build_vision_tower(config: Any, near: Iterable[str | Path] = ()) -> VisionTower:
    """The tower that a LLaVA configuration names, weights not loaded yet.

    Raises:
        CheckpointError: the tower cannot be found, or is of an unknown kind.
        FlagError: the selected layer or feature does not exist, or the tower is to see an image in several scales.
    """
    return tower_at(resolve_vision_tower(config.mm_vision_tower, near), config)


def tower_at(path: str, config: Any) -> VisionTower:
    """As `build_vision_tower`, of a resolved path."""
    if getattr(config, "s2", False):
        raise FlagError("the configuration asks for a tower in several scales (s2), which is not carried out here")
    return tower_class(path)(
        path,
        select_layer=config.mm_vision_select_layer,
        select_feature=getattr(config, "mm_vision_select_feature", "patch"),
    )


def set_normalization(image_processor: Any, name: str) -> None:
    """Let a processor normalise pixels as the tower was fed in training, where that is not its own way.

    Args:
        image_processor: of a loaded tower; changed in place.
        name: a value of `--mm_image_normalization`.

    Raises:
        FlagError: unknown name.
    """
    if name not in NORMALIZATIONS:
        raise FlagError(f"--mm_image_normalization is '{name}'; known values: {sorted(NORMALIZATIONS)}")
    values = NORMALIZATIONS[name]
    if values is not None:
        image_processor.image_mean, image_processor.image_std = map(list, values)
