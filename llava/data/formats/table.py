"""Parquet files, folders of Hugging Face `datasets` and data sets of its hub: rows of a memory-mapped Arrow table.

The package `datasets` reads them (the extra `data`). Parquet is converted once into its cache, so that a row in any
place costs the same. Images stay bytes until a row is asked for, and are decoded by the project's own reader.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.formats.reader import Rows, count_value, table_of
from llava.data.sizes import Size
from llava.errors import FlagError

PARQUET = b"PAR1"
"""First bytes of a Parquet file."""

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files in a folder that `save_to_disk` wrote: of one data set, and of one with splits."""

SPLIT = "train"
PACKAGE = "datasets"
PLACEHOLDER = {"path": "image"}
"""In place of an image whose row is only counted."""

BATCH = 1000

READ_AHEAD = 100
"""Rows of a stream that are in memory at a time, images included."""


class TableRows(Rows):
    """Rows of an Arrow table.

    Args:
        path: what to call it in messages.
        table: a `datasets.Dataset`.
    """

    def __init__(self, path: Path, table: Any) -> None:
        self.path = path
        self._table = table.with_format("arrow")  # nothing is decoded

    def __len__(self) -> int:
        return len(self._table)

    def value(self, index: int) -> Any:
        """A row as Python values; an image is `{"bytes": ..., "path": ...}`."""
        return self._table[index : index + 1].to_pylist()[0]

    @cached_property
    def sizes(self) -> np.ndarray:
        """Words and images of all rows, in one pass that reads no image."""
        return table_of(self._counted())

    def values(self) -> Iterator[Any]:
        """All rows in their order, as `value` gives them."""
        for batch in self._table.iter(READ_AHEAD):
            yield from batch.to_pylist()

    def _counted(self) -> Iterator[Size | None]:
        for batch in self._table.iter(BATCH):
            columns = {name: _without_bytes(batch.column(name)) for name in batch.column_names}
            for values in zip(*columns.values(), strict=True):
                yield count_value(dict(zip(columns, values, strict=True)))


def _without_bytes(column: Any) -> list[Any]:
    """Values of a column; of images, in parts of messages too, only where they are."""
    return [value for chunk in column.chunks for value in _light(chunk)]


def _light(array: Any) -> list[Any]:
    """Values of an array of Arrow, with `PLACEHOLDER` for bytes and for what `datasets` stores as an image."""
    import pyarrow.types as types

    kind = array.type
    if not _has_bytes(kind):
        return array.to_pylist()
    valid = array.is_valid().to_pylist()
    if types.is_struct(kind):
        if kind.get_field_index("type") < 0 and kind.get_field_index("bytes") >= 0:
            return [PLACEHOLDER if each else None for each in valid]
        names = [kind.field(number).name for number in range(kind.num_fields)]
        rows = zip(*map(_light, array.flatten()), strict=True)
        return [dict(zip(names, row, strict=True)) if each else None for row, each in zip(rows, valid, strict=True)]
    if not hasattr(kind, "value_type"):
        return [PLACEHOLDER if each else None for each in valid]
    items = iter(_light(array.flatten()))  # without those of lists that are null
    lengths = array.value_lengths().to_pylist()
    return [None if length is None else list(islice(items, length)) for length in lengths]


def _has_bytes(kind: Any) -> bool:
    """Whether values of a type of Arrow have bytes in them."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(_has_bytes(kind.field(number).type) for number in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _has_bytes(kind.value_type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((path / name).is_file() for name in (SAVED, SAVED_SPLITS))


def open_table(path: Path) -> TableRows:
    """A Parquet file, or a folder of `save_to_disk`; of one with splits, `train`.

    Raises:
        FlagError: `datasets` is not installed, or what is there cannot be read.
    """
    datasets = _package(str(path))
    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
        else:
            table = datasets.load_dataset("parquet", data_files=str(path), split=SPLIT)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise FlagError(f"--data_path {path}: cannot be read ({_first_line(error)})") from error
    if isinstance(table, datasets.DatasetDict):
        if SPLIT not in table:
            raise FlagError(f"--data_path {path}: has the splits {', '.join(table)}; name the folder of one of them")
        table = table[SPLIT]
    return TableRows(path, table)


def open_hub(name: str) -> TableRows:
    """A data set of the hub, by its id; its split `train`.

    Raises:
        FlagError: `datasets` is not installed, or the hub and its cache do not have it.
    """
    return TableRows(Path(name), load_hub(name))


def load_hub(name: str, **options: Any) -> Any:
    """A data set of the hub, by its id; its split `train`.

    Args:
        name: the id.
        options: for `datasets.load_dataset`, as `streaming`.

    Raises:
        FlagError: as `open_hub`.
    """
    datasets = _package(name)
    try:
        return datasets.load_dataset(name, split=SPLIT, **options)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise FlagError(
            f"--data_path {name}: there is no such file or folder, and as the id of a data set on the hub it cannot be "
            f"read ({_first_line(error)}); without a network only data sets in the hub's cache can"
        ) from error


def read_parquet(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file in their order, as `TableRows.value` gives them; nothing is converted.

    Raises:
        FlagError: `datasets`, whose package for Arrow reads them, is not installed, or the file is damaged.
    """
    _package(str(path))
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(READ_AHEAD):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise FlagError(f"--data_path {path}: cannot be read ({_first_line(error)})") from error


def package_problem(name: str) -> str | None:
    """Why a source of this kind cannot be read here; None if it can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"--data_path {name}: needs the package {PACKAGE}; pip install 'llava-extensions[data]'"
    return None


def _package(name: str) -> Any:
    problem = package_problem(name)
    if problem is not None:
        raise FlagError(problem)
    import datasets

    return datasets


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
