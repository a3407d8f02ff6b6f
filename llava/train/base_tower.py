"""The vision tower of a run's base: one that was trained into the base is kept.

Published scripts give `--vision_tower openai/clip-vit-large-patch14-336` in every stage, and upstream then replaces a
tower that an earlier stage has trained. Here such a base keeps its tower, and the log says so. The flag must name a
tower of the same kind and size; another one is used with `--replace_vision_tower True` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava.errors import CheckpointError, FlagError
from llava.extension import RunOptions
from llava.model.formats import TOWER_FOLDER, TOWER_MARKERS
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.builder import resolve_vision_tower, tower_at
from llava.model.multimodal_encoder.identity import DIGEST, TRAINED_FROM
from llava.runtime.files import read_json
from llava.runtime.hub import is_hub_id
from llava.runtime.places import same_place
from llava.runtime.weights.completeness import RUN_FILE

TEXT_ONLY = ("none", "None", "")
"""Values of `--vision_tower` that mean no tower although the base has one."""


def own_tower(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """Folder of the tower that a checkpoint carries, absolute; None if it names one elsewhere."""
    path = folder / TOWER_FOLDER
    carried = config.get("mm_vision_tower") == TOWER_FOLDER and any((path / name).is_file() for name in TOWER_MARKERS)
    return path.absolute() if carried else None


def choose_tower(args: RunOptions, folder: Path, config: Mapping[str, Any]) -> str | None:
    """Set `--vision_tower` to the tower that the run uses.

    Args:
        args: options of the run, before any extension has looked at them.
        folder: the base; on a hub, its files here.
        config: its `config.json`; empty if it has none.

    Returns:
        What the log has to say about a flag that was given; None where there is nothing to say.

    Raises:
        FlagError: the flag asks for another kind of tower than the base has, or for none beside a trained one.
        CheckpointError: there is no tower of that name.
    """
    model, named = args.model, config.get("mm_vision_tower")
    asked = model.vision_tower if "vision_tower" in args.given else None
    own = own_tower(folder, config)
    if asked in TEXT_ONLY:
        if own is not None:
            raise FlagError(
                f"--vision_tower {asked}: {folder} has a vision tower of its own, which its checkpoints have to carry; "
                "leave the flag out, the rows may be text alone"
            )
        model.vision_tower = None
        return None
    if named is None:
        return None
    if own is None:
        if asked is None:
            model.vision_tower = _found(named, folder, config)
            return None
        return None if _is(asked, named, folder) else f"--vision_tower {asked}: {folder} was trained with {named}"
    if model.replace_vision_tower:
        if asked is None:
            raise FlagError(f"--replace_vision_tower True: needs --vision_tower, the tower to replace that of {folder}")
        return f"--vision_tower {asked} replaces the tower that was trained into {folder}"
    model.vision_tower = str(own)
    if asked is None or _is(asked, str(own), folder):
        return None
    looked_at = _check_kind(asked, own, folder, config)
    return (
        f"--vision_tower {asked} is not used{'' if looked_at else ' (nor looked at: it is not here)'}: {folder} has "
        "its own trained tower, which is kept; --replace_vision_tower True replaces it"
    )


def _found(named: str, folder: Path, config: Mapping[str, Any]) -> str:
    """Where the tower that a base names is; the name itself where it is not found, which `build.py` reports."""
    try:
        return resolve_vision_tower(named, [folder], moved=config.get(DIGEST) is not None)
    except CheckpointError:
        return named


def _is(asked: str, other: str, folder: Path) -> bool:
    """True if two names mean the same tower."""
    if asked == other:
        return True
    try:
        places = [resolve_vision_tower(name, [folder]) for name in (asked, other)]
    except CheckpointError:  # whoever reads the tower reports it
        return False
    return same_place(Path(places[0]), Path(places[1]))


def _first_names(folder: Path, config: Mapping[str, Any]) -> set[Any]:
    """Names of the tower that the trained one was at first; folders of earlier versions have it in their `run.json`."""
    names = {config.get(TRAINED_FROM)}
    if (folder / RUN_FILE).is_file():
        sections = read_json(folder / RUN_FILE).get("arguments")
        model = sections.get("model") if isinstance(sections, dict) else None
        names.add(model.get("vision_tower") if isinstance(model, dict) else None)
    return names - {None}


def _check_kind(asked: str, own: Path, folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a tower could be looked at, and refuse one that the base's was not made from.

    Raises:
        FlagError: it is of another kind or size.
        CheckpointError: there is none of that name, which the base was not trained with either.
    """
    try:
        path = resolve_vision_tower(asked, [folder])
        theirs = _tower(path)
    except CheckpointError:
        if asked in _first_names(folder, config) or is_hub_id(asked):
            return False
        raise
    ours = _tower(str(own))
    if (type(ours), ours.shape) != (type(theirs), theirs.shape):
        raise FlagError(
            f"--vision_tower {asked}: is a {type(theirs).__name__} of {theirs.shape}, but {folder} has a trained tower "
            f"of its own, a {type(ours).__name__} of {ours.shape}; leave the flag out to train on with it, or pass "
            "--replace_vision_tower True to begin with the other one"
        )
    return True


def _tower(path: str) -> VisionTower:
    """A tower whose weights are not read; hidden state -1 exists in all."""
    return tower_at(path, SimpleNamespace(mm_vision_select_layer=-1))
