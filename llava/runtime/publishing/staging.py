"""The files of a publication: what loads the finished model, and no path of the machine that trained it.

A folder of links is made, in which small files are changed; what only resumes a run stays out. Local paths in
`run.json` and `adapter_config.json` become the last part of their name, or the hub id that `--hub_base_model` gives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.runtime.files import read_json
from llava.runtime.hub import is_hub_id
from llava.runtime.places import RUN_FILE
from llava.runtime.weights.completeness import FILE_LIST, check_file_list

ADAPTER_CONFIG = "adapter_config.json"
BASE_KEY = "model_name_or_path"


def listed_files(folder: Path) -> list[str]:
    """Names of the files that a finished folder loads from, as its own record has them.

    Raises:
        CheckpointError: there is no record, or a file of it is missing.
    """
    record = folder / FILE_LIST
    if not record.is_file():
        raise CheckpointError(
            f"{folder}: has no {FILE_LIST}, so it is not the finished folder of a run (nor one of its checkpoints)"
        )
    check_file_list(folder)
    return sorted(read_json(record)["model"])


def find_run_record(folder: Path) -> Path | None:
    """`run.json` of a folder, or of the output folder that it is in."""
    return next((place / RUN_FILE for place in (folder, folder.parent) if (place / RUN_FILE).is_file()), None)


def link_files(folder: Path, names: list[str], target: Path) -> None:
    """Put files of a folder under the same names into another one, without copying them."""
    for name in names:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to((folder / name).resolve())


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in the place of a link, whose target stays as it is."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def without_places(value: Any) -> Any:
    """A JSON value in which every path of a machine is the last part of its name."""
    if isinstance(value, Mapping):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and is_place(value) else value


def is_place(text: str) -> bool:
    """True for a path of a machine: an absolute one, one from the home or working folder, or one that exists."""
    if os.path.isabs(text) or text.startswith(("./", "../", "~")):
        return True
    return os.sep in text and len(text) < 4096 and "\n" not in text and Path(text).exists()


def hub_base(name: Any, given: str | None) -> str | None:
    """The hub id of a base: the one that was given, or the name if the run read it from the hub; else None."""
    if given is not None:
        return given
    return name if isinstance(name, str) and is_hub_id(name) and not Path(name).exists() else None


def stage(folder: Path, target: Path, base_model: str | None = None) -> None:
    """Make the folder that is uploaded, without its card.

    Args:
        folder: finished folder of a run, of its adapter, or a checkpoint.
        target: an empty folder.
        base_model: id of the base on the hub.

    Raises:
        CheckpointError: the folder is not a finished one.
    """
    link_files(folder, listed_files(folder), target)
    adapter = target / ADAPTER_CONFIG
    if adapter.is_file():
        values = read_json(adapter)
        if base_model is not None:
            values["base_model_name_or_path"] = base_model
        replace_json(adapter, without_places(values))
    record = find_run_record(folder)
    if record is not None:
        values = without_places(read_json(record))
        for part in [values, *values.get("resumes", [])] if base_model is not None else []:
            model = part.get("arguments", part).get("model")
            if isinstance(model, dict) and BASE_KEY in model:
                model[BASE_KEY] = base_model
        replace_json(target / RUN_FILE, values)
