"""The files of full weights in a folder: one, or an index with its shards, each there and of full length."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from llava.errors import CheckpointError
from llava.runtime.files import read_json, refuse_pointer, refuse_pointers
from llava.runtime.hub import local_folder
from llava.runtime.weights.completeness import check_file_list
from llava.runtime.weights.tensors import Entry, describe
from llava.runtime.weights.torch_files import load_plain

WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Full weights, one file or the index of several, in the order in which transformers looks for them."""


HUB_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")
"""Patterns of the same, with the files that an index lists, as they are fetched from a hub."""


def first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of several files that a folder has, or None."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def weight_files(weights: Path | None) -> list[Path]:
    """The files of full weights, each there and of full length.

    Args:
        weights: a file of weights or the index of several; None for none.

    Raises:
        CheckpointError: the index names a file that is missing or lies elsewhere, or a file is damaged.
    """
    if weights is None:
        return []
    if weights.suffix != ".json":
        files = [weights]
    else:
        table = read_json(weights).get("weight_map")
        if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
            raise CheckpointError(f"{weights}: has no 'weight_map' of file names, so it is not an index of weights")
        names = sorted(set(table.values()))
        elsewhere = [name for name in names if Path(name).name != name]
        if elsewhere:
            raise CheckpointError(f"{weights}: names files outside its folder: {elsewhere}")
        missing = [name for name in names if not (weights.parent / name).is_file()]
        if missing:
            raise CheckpointError(f"{weights}: names {len(names)} files, of which {missing} are missing")
        if not isinstance(read_json(weights).get("metadata"), dict):  # without it transformers reads no index
            raise CheckpointError(f"{weights}: its 'metadata' is missing or not an object")
        files = [weights.parent / name for name in names]
    for path in files:
        _check_length(path)
    return files


def check_weight_files(folder: str | Path) -> None:
    """Look at the weights in a folder here that transformers is about to read; others are left to it.

    Raises:
        CheckpointError: as `weight_files`.
    """
    weight_files(first_file(Path(folder), WEIGHT_FILES))


def described_weights(weights: Path | None) -> dict[str, Entry]:
    """What the files of full weights contain, values not read.

    Raises:
        CheckpointError: as `weight_files`, or the index names a tensor that its file does not have.
    """
    entries = describe(weight_files(weights))
    if weights is not None and weights.suffix == ".json":
        for name, file in read_json(weights)["weight_map"].items():
            if name not in entries or entries[name].path.name != file:
                raise CheckpointError(f"{weights.parent / file}: lacks '{name}', which {weights} says is in it")
    return entries


def weights_of(folder: Path) -> dict[str, Entry]:
    """As `described_weights`, of a folder; nothing if it has no full weights."""
    return described_weights(first_file(folder, WEIGHT_FILES))


def named_weights(name: str | Path, cache_dir: str | None = None) -> tuple[Path, dict[str, Entry]]:
    """A folder and what its full weights contain; of a model on a hub, where its files are kept here.

    Raises:
        CheckpointError: as `described_weights`, or the hub does not have it.
    """
    if Path(name).is_dir():
        return Path(name), weights_of(Path(name))
    for pattern in HUB_WEIGHTS:
        folder = local_folder(name, (pattern,), cache_dir=cache_dir)
        if folder.is_dir() and (entries := weights_of(folder)):
            return folder, entries
    return Path(name), {}


def check_base(folder: str | Path) -> None:
    """Look at the weights of a base that is a folder here; one on a model hub is left to transformers.

    Raises:
        CheckpointError: it holds no weights, or as `weight_files`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return
    weights = first_file(folder, WEIGHT_FILES)
    if weights is None:
        raise CheckpointError(f"{folder}: holds none of {WEIGHT_FILES}, so it is no base (found: {listing(folder)})")
    check_file_list(folder)
    refuse_pointers(folder)
    weight_files(weights)


def _check_length(path: Path) -> None:
    """Refuse a file that was cut off, and a pickle that asks for more than tensors; most of it is not read."""
    try:
        if path.suffix == ".safetensors":
            refuse_pointer(path)
            with safe_open(path, "pt"):
                return
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is damaged or was cut off ({error})") from error
    load_plain(path, mapped=True)


def listing(folder: Path) -> str:
    """Names of the first files in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "an empty folder"
