"""Names of models that may be folders or ids on a model hub (`owner/name`).

Everything below works on folders; an id is fetched into the hub's cache first, or found there when offline.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path, PurePath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from llava.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja")
"""Patterns of the files that a tokenizer consists of."""


def is_hub_id(name: str | Path) -> bool:
    """True for `owner/name`; a path that begins with a dot or a slash is none."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")


def local_folder(
    name: str | Path,
    patterns: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: bool | None = None,
) -> Path:
    """The folder that a name means.

    Args:
        name: folder, or id on the hub.
        patterns: file names to fetch, as glob patterns; None: all.
        revision: branch, tag or commit on the hub.
        cache_dir: where fetched files are kept; None: the hub's own cache.
        token: True: use the stored login.

    Returns:
        The folder; `name` itself if it is no id, whether it exists or not.

    Raises:
        CheckpointError: the hub does not have it, cannot be reached, or is not to be asked and the cache lacks it.
    """
    path = Path(name)
    if path.exists() or not is_hub_id(name):
        return path
    try:
        found = snapshot_download(
            str(name),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=None if patterns is None else list(patterns),
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name}: there is no such folder, and it cannot be fetched from the model hub either "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    return Path(found)


def data_set_revision(name: str) -> str | None:
    """The commit of a data set on the hub, or in its cache when offline; None if neither has it.

    What is not there is not an error here: opening the data set, which is done before a model is made, says so.
    """
    if importlib.util.find_spec("datasets") is None:
        return None
    import datasets

    try:
        return str(datasets.load_dataset_builder(name).hash)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError):
        return None


def get_model_name_from_path(model_path: str) -> str:
    """Last part of a path, with its parent's name in front for a `checkpoint-<step>` folder."""
    path = PurePath(model_path)
    return f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name
