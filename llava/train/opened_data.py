"""The data of a run, opened once before its model is made, so that what cannot be read is said in seconds."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np

from llava.data.image_names import image_names
from llava.data.rows import RowFiles
from llava.data.sizes import UNCOUNTED
from llava.errors import BadSampleError, FlagError
from llava.runtime.hub import data_set_revision
from llava.runtime.places import split_weight
from llava.runtime.values import refuse, too_few_rows
from llava.train.build import rows_of_run
from llava.train.options import RunArguments


def check_data(args: RunArguments) -> None:
    """Open the sources of a run, one process before the others; of a stream, look for those on the hub.

    The data of a program around this one (`args.program`) are its own to check.

    Raises:
        FlagError: a source cannot be read, or there are too few rows for one batch and an incomplete one is left out.
    """
    if args.program:
        return
    measured = args.evaluation.eval_data_path
    if measured:
        rows_of_run(dataclasses.replace(args, data=dataclasses.replace(args.data, data_path=list(measured))))
    if args.data.streaming:
        _find_on_hub(args.data.data_path or [])
        return
    records = rows_of_run(args)
    if args.training.dataloader_drop_last:
        rows = _with_image(records) if args.data.requires_image else len(records)
        size = args.training.per_device_train_batch_size
        line = too_few_rows(rows, size, args.training.world_size, "--per_device_train_batch_size")
        refuse([] if line is None else [line])


def _find_on_hub(paths: list[str]) -> None:
    names = [split_weight(path)[0] for path in paths]
    lost = [name for name in names if not Path(name).exists() and data_set_revision(name) is None]
    if lost:
        raise FlagError(
            f"--data_path {', '.join(lost)}: there is no such file or folder, and neither the hub nor its cache has a "
            "data set of this name"
        )


def _with_image(records: RowFiles) -> int:
    """Number of rows that `--requires_image True` leaves."""
    sizes = records.sizes
    count = int((sizes["images"] > 0).sum())
    for row in np.flatnonzero(sizes["words"] == UNCOUNTED).tolist():
        with contextlib.suppress(BadSampleError):  # said when the row is read in the run
            count += bool(image_names(records[row]))
    return count
