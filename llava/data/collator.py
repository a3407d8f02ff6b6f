"""Putting items of the training data set together (upstream `DataCollatorForSupervisedDataset`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX
from llava.data.splice_plan import SplicePlanner
from llava.runtime.failure import failed_batch


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads items on the right and cuts them at the tokenizer's `model_max_length`.

    Attributes:
        tokenizer: gives the padding id and the length.
        planner: plans how images are put into the text, for the model that is trained; None leaves that to the model.
    """

    tokenizer: PreTrainedTokenizerBase
    planner: SplicePlanner | None = None

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate B items.

        Returns:
            `input_ids` int64 (B, T); `labels` int64 (B, T) with -100 at padding; `attention_mask` bool (B, T), True
            for every token of a row, `<unk>` included although padding has its id; if the items have images,
            `images` float32 (N, 3, height, width) in the order of the rows, or a list of (3, height, width) if sizes
            differ; if they have tiles, a list of (tiles, 3, height, width), and `image_sizes`, each width and height.
            With a planner also `plan`, the batch as it is after splicing. A bad sample that a worker met makes the
            batch what `failed_batch` says.
        """
        failed = failed_batch(instances)
        if failed is not None:
            return failed
        end = self.tokenizer.model_max_length
        rows = [instance["input_ids"][:end] for instance in instances]
        labels = [instance["labels"][:end] for instance in instances]
        mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence(mask, batch_first=True, padding_value=False),
        }
        if "image_sizes" in instances[0]:
            batch["images"] = [image for instance in instances for image in instance["image"]]
            batch["image_sizes"] = [size for instance in instances for size in instance["image_sizes"]]
        elif "image" in instances[0]:
            images = [image for instance in instances for image in _as_batch(instance["image"])]
            same_size = len({image.shape for image in images}) == 1
            batch["images"] = torch.stack(images) if same_size else images
        if self.planner is not None:
            batch["plan"] = self.planner(batch)
        return batch


def _as_batch(image: Tensor) -> Tensor:
    """(N, 3, height, width) from (3, height, width) or (N, 3, height, width)."""
    return image if image.dim() == 4 else image.unsqueeze(0)
