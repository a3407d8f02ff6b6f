"""Sources of a stream: JSON, Parquet, folders and hub ids of `datasets`, each read from its beginning in every pass.

The rows of a source are dealt out over the processes: of a hub's data set whole files, where their number divides, and
else every n-th row. A process reads no row of another twice, and no row belongs to two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava.data.formats.json_file import read_values
from llava.data.formats.reader import Row, llava_row
from llava.data.formats.table import READ_AHEAD, load_hub, open_table, read_parquet
from llava.data.rows import is_parquet, source_problem
from llava.errors import FlagError
from llava.runtime.places import split_weight


class StreamRow(NamedTuple):
    """A row of a stream as its source has it, and where it is from."""

    source: str
    number: int
    value: Any

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return f"{self.source}, row {self.number}"

    def row(self) -> Row:
        """The row in LLaVA's form.

        Raises:
            BadSampleError: it has none; names source and row.
        """
        return llava_row(self.value, self.name)


@dataclass(frozen=True)
class Share:
    """Which rows belong to this process: of `processes`, the one with the number `process`."""

    process: int
    processes: int


@dataclass(frozen=True)
class Source:
    """A source of rows.

    Attributes:
        name: path or hub id.
        weight: how often a pass has each row: the whole part repeats all, the rest is a drawn share.
        values: the rows of a share in their order, each with its number.
    """

    name: str
    weight: float
    values: Callable[[Share], Iterator[tuple[int, Any]]]

    def label(self, share: Share) -> str:
        """What the rows of a share are numbered in: the source, or of a hub's data set the part of the process."""
        if not isinstance(self.values, _HubValues) or share.processes == 1:
            return self.name
        return f"{self.name} (part {share.process + 1} of {share.processes})"

    def rows(self, share: Share, seed: int) -> Iterator[StreamRow]:
        """What a pass has of this source: all rows as often as the weight says, then the drawn ones.

        Args:
            share: of this process.
            seed: says which rows are drawn, the same in every pass.
        """
        label = self.label(share)
        for _ in range(int(self.weight)):
            yield from (StreamRow(label, number, value) for number, value in self.values(share))
        rest = self.weight - int(self.weight)
        if rest:
            # One draw a row: how many rows there are is not known.
            draws = np.random.default_rng([seed, share.process])
            for number, value in self.values(share):
                if draws.random() < rest:
                    yield StreamRow(label, number, value)


def open_sources(names: Sequence[str]) -> list[Source]:
    """The sources of `--data_path`, each with a weight where its name ends in `@WEIGHT`; nothing is read.

    Raises:
        FlagError: there is none, or nothing to read under a name.
    """
    if not names:
        raise FlagError("--data_path is missing")
    problem = next(filter(None, map(source_problem, names)), None)
    if problem is not None:
        raise FlagError(problem)
    return [Source(name, weight, _values_of(name)) for name, weight in map(split_weight, names)]


def _values_of(name: str) -> Callable[[Share], Iterator[tuple[int, Any]]]:
    path = Path(name)
    if path.is_dir():
        return _EveryNth(path, _folder_values)
    if not path.is_file():
        return _HubValues(name)
    return _EveryNth(path, read_parquet if is_parquet(path) else read_values)


def _folder_values(path: Path) -> Iterator[Any]:
    return open_table(path).values()


@dataclass(frozen=True)
class _EveryNth:
    """The rows of a file or folder whose number in it is that of the process, and every n-th after it."""

    path: Path
    read: Callable[[Path], Iterator[Any]]

    def __call__(self, share: Share) -> Iterator[tuple[int, Any]]:
        return islice(enumerate(self.read(self.path)), share.process, None, share.processes)


@dataclass(frozen=True)
class _HubValues:
    """The rows of a hub's data set, numbered within the part that `datasets` gives to the process."""

    name: str

    def __call__(self, share: Share) -> Iterator[tuple[int, Any]]:
        return enumerate(streamed_values(load_hub(self.name, streaming=True), self.name, share))


def streamed_values(stream: Any, name: str, share: Share) -> Iterator[Any]:
    """The rows of a share of a `datasets.IterableDataset` as Python values, images as bytes.

    Raises:
        FlagError: the stream ends in an error, as by a lost network.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    part = split_dataset_by_node(stream, share.process, share.processes).with_format("arrow")
    try:
        for batch in part.iter(READ_AHEAD):
            yield from batch.to_pylist()
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise FlagError(f"--data_path {name}: cannot be read further ({type(error).__name__}: {error})") from error
