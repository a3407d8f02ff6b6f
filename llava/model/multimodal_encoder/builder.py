"""Finding and building the vision tower of a model (upstream `multimodal_encoder/builder.py`).

A tower named by a bare name is looked for inside the checkpoint folder, then beside it, then in the working folder;
only a name of the form `owner/model` may come from a model hub.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


def resolve_vision_tower(name: str, near: Iterable[str | Path] = ()) -> str:
    """Path or hub id of a tower.

    Args:
        name: value of `--vision_tower` or of `mm_vision_tower` in a `config.json`.
        near: checkpoint folders in whose inside and neighbourhood a relative name is looked for.

    Raises:
        CheckpointError: no folder of that name exists and the name is no hub id; lists the places searched.
    """
    searched: list[Path] = []
    for folder in map(Path, near):
        searched += [folder / name, folder.resolve().parent / name]
    searched.append(Path(name))
    for candidate in searched:
        if (candidate / "config.json").is_file():
            return str(candidate)
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/"))
    if is_hub_id:
        return name
    places = "\n  ".join(str(path) for path in searched)
    raise CheckpointError(
        f"no vision tower '{name}': none of these folders holds a config.json\n  {places}\n"
        "Put the tower there or give its folder by --vision_tower."
    )


def build_vision_tower(config: Any, near: Iterable[str | Path] = ()) -> CLIPVisionTower:
    """The tower that a LLaVA configuration names, weights not loaded yet.

    Raises:
        CheckpointError: the tower cannot be found.
        FlagError: the selected layer or feature does not exist.
    """
    path = resolve_vision_tower(config.mm_vision_tower, near)
    return CLIPVisionTower(
        path,
        select_layer=config.mm_vision_select_layer,
        select_feature=getattr(config, "mm_vision_select_feature", "patch"),
    )
