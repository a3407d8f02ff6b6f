"""A stream of rows as items of training batches, the same for any number of worker processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llava.data.formats.reader import count_value
from llava.data.image_names import image_names
from llava.data.samples import Item, Samples
from llava.data.skipped import append_skipped
from llava.data.streams.sources import StreamRow
from llava.data.streams.stream import LookAhead, RowStream
from llava.errors import BadSampleError, LlavaError
from llava.runtime.failure import failed_item

logger = logging.getLogger(__name__)

LOOK_AHEAD = 1000
"""Rows among which one is looked for that takes the place of a bad one."""

PASSED: Item = {"passed": True}
"""In place of an item of a batch that a resumed run has been trained on."""


class StreamedDataset(Samples, IterableDataset[Item]):
    """Items of the rows of a stream, without an end; see `LazySupervisedDataset` for what an item has.

    Worker w of W makes the batches w, w + W, ..., which is the order in which torch's DataLoader asks for them.

    Args:
        stream: the rows of this process.
        batch_size: rows in a batch of this process.
        samples: as `Samples` takes them. `on_bad_sample="skip"` gives in place of a bad row the next good one of the
            same modality, or where none is among the next `LOOK_AHEAD`, and it seemed to be text, one with an image.

    Attributes:
        passed: batches of this process that a resumed run has been trained on.
    """

    def __init__(self, stream: RowStream, *samples: Any, batch_size: int, **options: Any) -> None:
        super().__init__(*samples, **options)
        self.stream = stream
        self.batch_size = batch_size
        self.passed = 0
        self._bad_rows: set[tuple[str, int]] = set()

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            ahead = LookAhead(self.stream, self.passed * self.batch_size)
            for batch in count(first, step):
                for position in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                    yield PASSED if batch < self.passed else self._item(ahead, position)
        except LlavaError as error:
            yield failed_item(error)  # raises, outside of worker processes

    def _item(self, ahead: LookAhead, position: int) -> Item:
        ahead.forget_before(position)
        if self.on_bad_sample == "stop":
            return self._load(ahead[position])
        has_image = _images(ahead[position]) > 0
        for any_kind in (False, True) if not has_image and self.transform is not None else (False,):
            for candidate in map(ahead.__getitem__, range(position, position + LOOK_AHEAD)):
                same_kind = (_images(candidate) > 0) == has_image
                if (candidate.source, candidate.number) in self._bad_rows or not (same_kind or any_kind):
                    continue
                try:
                    return self._load(candidate)
                except BadSampleError as error:
                    self._skip(candidate, error)
        kind = "with" if has_image else "without"
        raise BadSampleError(
            f"{ahead[position].name}: is bad, and of the next {LOOK_AHEAD} rows none {kind} image can be trained on; "
            f"see {self.skipped_file}"
        )

    def _load(self, found: StreamRow) -> Item:
        return self.prepare(found.row(), found.name)

    def _skip(self, found: StreamRow, error: BadSampleError) -> None:
        """Remember and list a bad row."""
        self._bad_rows.add((found.source, found.number))
        sample_id = found.value.get("id") if isinstance(found.value, dict) else None
        append_skipped(self.skipped_file, (Path(found.source), found.number), sample_id, str(error))
        logger.warning("skipped a sample: %s", error)


def _images(found: StreamRow) -> int:
    """Images of a row; none of one that cannot be read."""
    size = count_value(found.value)
    return 0 if size is None else size.images


def may_have_image(found: StreamRow) -> bool:
    """Whether `--requires_image True` keeps a row; one that cannot be read is kept, and is bad where it is used."""
    try:
        return bool(image_names(found.row()))
    except BadSampleError:
        return True


def _collate(collate: Callable[[Sequence[Item]], Any], items: Sequence[Item]) -> Mapping[str, Any]:
    return PASSED if PASSED.keys() <= items[0].keys() else collate(items)


def stream_loader(dataset: StreamedDataset, collate: Callable[[Sequence[Item]], Any], **options: Any) -> DataLoader:
    """The batches of this process as `collate` makes them; the first `passed` ones are empty.

    Args:
        dataset: the stream.
        collate: makes a batch of items.
        options: for torch's DataLoader.
    """
    return DataLoader(dataset, batch_size=dataset.batch_size, collate_fn=partial(_collate, collate), **options)
