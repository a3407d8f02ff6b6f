"""The files of a publication: what loads the finished model, and no path of the machine that trained it.

A folder of links is made, in which small files are changed; what only resumes a run stays out. Local paths in
`run.json` and `adapter_config.json` become the last part of their name, or the hub id that `--hub_base_model` gives.
An option that is a path is known by its name, so a relative one is found from any folder.
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
from llava.runtime.places import OPEN_CLIP, RUN_FILE, split_weight
from llava.runtime.unchanged import DATA_SETS, FINGERPRINTS, PATHS, hub_sources
from llava.runtime.weights.completeness import FILE_LIST, check_file_list
from llava.runtime.weights.run_file import CHANGED, RESUMED_FROM, RESUMES

ADAPTER_CONFIG, ADAPTER_BASE = "adapter_config.json", "base_model_name_or_path"
BASE_KEY = "model_name_or_path"

LOCAL = PATHS | {
    *("output_dir", "logging_dir", "log_dir", "cache_dir", "data_cache_dir", "resume", "resume_from_checkpoint"),
    *("eval_image_folder", "eval_data_dir", "eval_questions", "deepspeed", "fsdp_config", "accelerator_config"),
}
"""Options that are cut to the last part of a path, absolute or not."""

WITH_DIGEST = frozenset({BASE_KEY, "vision_tower", "peft_path", "llama_model_path"})
"""Of these, options that name weights: what was a folder or file where the run was has a fingerprint."""


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
    return _without_place(value) if isinstance(value, str) else value


def _without_place(text: str) -> str:
    """A text that may be a path, or a word and a path (`auto:/data/me/x.json`)."""
    word, colon, rest = text.partition(":")
    if colon and not rest.startswith("//") and is_place(rest):
        return f"{word}:{Path(rest).name}"
    return Path(text).name if is_place(text) else text


def published_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's record without paths of the machine, and without what tells how it was resumed."""
    resumes = [_published_part(part) for part in record.get(RESUMES, [])]
    first = _published_part({name: value for name, value in record.items() if name != RESUMES})
    return first | ({RESUMES: resumes} if resumes else {})


def _published_part(record: Mapping[str, Any]) -> dict[str, Any]:
    prints = record.get(FINGERPRINTS) or {}
    options = {name: value for name, value in record.items() if name not in (FINGERPRINTS, CHANGED, RESUMED_FROM)}
    found = without_places(_cut_options(options, prints))
    return found | ({FINGERPRINTS: record[FINGERPRINTS]} if FINGERPRINTS in record else {})


def _cut_options(value: Any, prints: Mapping[str, Any]) -> Any:
    """A table of a record in which every option of `LOCAL` is cut, also those of tables in it."""
    if not isinstance(value, Mapping):
        return value
    return {
        name: _cut_option(name, each, prints) if name in LOCAL else _cut_options(each, prints)
        for name, each in value.items()
    }


def _cut_option(option: str, value: Any, prints: Mapping[str, Any]) -> Any:
    """The value of an option that is a path, cut to the last part of it; an id on the hub stays whole."""
    if isinstance(value, list):
        return [_cut_option(option, each, prints) for each in value]
    # A value with a brace is a table as JSON, or the text of a template.
    if not isinstance(value, str) or "{" in value:
        return value
    if value.startswith(OPEN_CLIP):
        architecture, slash, rest = value.partition("/")
        return f"{architecture}{slash}{Path(rest).name}"
    path = split_weight(value)[0]
    on_hub = path in hub_sources(str(prints.get(option, ""))) if option in DATA_SETS else option not in prints
    if on_hub and option in DATA_SETS | WITH_DIGEST and hub_base(path, None) is not None:
        return value
    return (Path(path).name or path) + value[len(path) :]


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
    record = find_run_record(folder)
    # What has a fingerprint was a folder or file where the run was, even if it is not there now.
    prints = {} if record is None else read_json(record).get(FINGERPRINTS) or {}
    adapter = target / ADAPTER_CONFIG
    if adapter.is_file():
        values = read_json(adapter)
        if base_model is not None:
            values[ADAPTER_BASE] = base_model
        elif isinstance(values.get(ADAPTER_BASE), str) and BASE_KEY in prints:
            values[ADAPTER_BASE] = Path(values[ADAPTER_BASE]).name
        replace_json(adapter, without_places(values))
    if record is not None:
        values = published_record(read_json(record))
        for part in [values, *values.get("resumes", [])] if base_model is not None else []:
            model = part.get("arguments", part).get("model")
            if isinstance(model, dict) and BASE_KEY in model:
                model[BASE_KEY] = base_model
        replace_json(target / RUN_FILE, values)
