"""How the error of a bad sample gets out of a process that prepares data.

torch raises it again with the worker's traceback in place of its text. Here the worker hands the error over as a value,
in an item and then in a batch, and whoever reads the batches raises it as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import get_worker_info

from llava.errors import LlavaError

FAILURE = "failure"
"""Key of the error in an item or a batch, which then holds nothing else."""


def failed_item(error: LlavaError) -> dict[str, Any]:
    """What a data set returns in place of a sample that is bad; in the main process it raises the error.

    Raises:
        LlavaError: `error`, if no worker process is between this one and the reader.
    """
    if get_worker_info() is None:
        raise error
    return {FAILURE: error}


def failed_batch(items: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The batch that a collator returns if one of its items is of `failed_item`; None if all are good."""
    return next((dict(item) for item in items if FAILURE in item), None)


def good_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches as they come.

    Raises:
        LlavaError: a batch is of `failed_batch`.
    """
    for batch in batches:
        if isinstance(batch, Mapping) and FAILURE in batch:
            raise batch[FAILURE]
        yield batch
