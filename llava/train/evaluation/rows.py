"""The rows of `--eval_data_path`: prepared as those that are trained on, each in its groups.

A row is in the group of its modality (`image` or `text`) and of its task: what it says under one of `TASK_KEYS`, or the
name of its file where there are several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from llava.data.dataset import Item, LazySupervisedDataset
from llava.data.image_names import image_names
from llava.errors import BadSampleError
from llava.runtime.failure import failed_item
from llava.runtime.monitoring.shares import LEFT_OUT
from llava.train.build import build_dataset
from llava.train.options import RunArguments

TASK_KEYS = ("task", "task_type", "category")
"""Keys under which a row may say its task, the first that it has."""

MakeDataset = Callable[[RunArguments, Any, Any], LazySupervisedDataset]


class EvaluationRows(Dataset[Item]):
    """Rows to measure the loss on. With `--on_bad_sample skip` a bad one does not count, whatever takes its place.

    Args:
        dataset: the rows.
    """

    def __init__(self, dataset: LazySupervisedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        if self.dataset.on_bad_sample != "skip":
            return self.dataset[index]
        try:
            return self.dataset.load(index)
        except BadSampleError as error:
            found = self._next_good_row(index)
            return failed_item(error) if found is None else found | {LEFT_OUT: str(error)}

    def _next_good_row(self, index: int) -> Item | None:
        """Not by the dataset itself, whose list of skipped rows is that of the training."""
        for step in range(1, len(self)):
            try:
                return self.dataset.load((index + step) % len(self))
            except BadSampleError:
                continue
        return None

    def groups(self, index: int) -> Sequence[str]:
        """The modality and the task of a row; none of a bad one."""
        rows = self.dataset.rows
        try:
            row = rows[index]
            modality = "image" if image_names(row) else "text"
        except BadSampleError:
            return ()
        named = next((str(row[key]) for key in TASK_KEYS if row.get(key) not in (None, "")), None)
        if named is None and len(rows.files) > 1:
            named = rows.source(index)[0].stem
        return (modality,) if named is None else (modality, f"task_{'_'.join(named.split())}")


class NoRows(Dataset[Item]):
    """In place of rows, where an evaluation asks questions alone."""

    def __len__(self) -> int:
        return 0


def evaluation_rows(
    args: RunArguments, tokenizer: Any, model: Any, make: MakeDataset = build_dataset
) -> EvaluationRows | NoRows:
    """The rows of `--eval_data_path`, made as the training data is by `make`."""
    paths = args.evaluation.eval_data_path
    if not paths:
        return NoRows()
    data = dataclasses.replace(args.data, data_path=list(paths), requires_image=False, streaming=False)
    return EvaluationRows(make(dataclasses.replace(args, data=data), tokenizer, model))
