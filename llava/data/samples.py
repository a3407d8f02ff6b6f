"""A row to an item: token ids, labels and pixel values, with what a model and the options of a run say of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.conversation import Conversation
from llava.data.formats.reader import Row
from llava.data.image_names import RowImage, image_names
from llava.data.images import ImageTransform, ProcessedImage, row_image
from llava.data.labels import tokenize_conversation
from llava.data.templates import check_system, row_template
from llava.data.tiling import GridPinpoints, ImageLength
from llava.errors import BadImageError, BadSampleError, FlagError

Item = dict[str, Any]

ON_BAD_SAMPLE = ("stop", "skip")
"""Values of `--on_bad_sample`."""


class Samples:
    """Makes the items of a data set; `LazySupervisedDataset` explains arguments and items.

    Raises:
        FlagError: options contradict each other.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        *,
        template: Conversation,
        image_folder: str | os.PathLike[str] | None,
        image_aspect_ratio: str,
        image_grid_pinpoints: GridPinpoints | None = None,
        is_multimodal: bool,
        mm_use_im_start_end: bool,
        model_max_length: int,
        image_length: ImageLength | None = None,
        on_bad_sample: str = "stop",
        skipped_file: str | os.PathLike[str] | None = None,
    ) -> None:
        if on_bad_sample not in ON_BAD_SAMPLE:
            raise FlagError(f"--on_bad_sample {on_bad_sample}: not known; known: {', '.join(ON_BAD_SAMPLE)}")
        if on_bad_sample == "skip" and skipped_file is None:
            raise FlagError("--on_bad_sample skip needs a file to list the skipped rows in")
        if is_multimodal and image_processor is None:
            raise FlagError("a model with a vision tower needs its image processor to prepare the data")
        self.tokenizer = tokenizer
        self.transform = (
            ImageTransform(image_processor, image_aspect_ratio, image_grid_pinpoints) if is_multimodal else None
        )
        self.template = template
        self.image_folder = image_folder
        self.mm_use_im_start_end = mm_use_im_start_end
        self.model_max_length = model_max_length
        self.image_length = image_length
        self.on_bad_sample = on_bad_sample
        self.skipped_file = skipped_file

    def prepare(self, row: Row, name: str) -> Item:
        """The item of a row, with no other in the place of a bad one.

        Args:
            row: the row, in LLaVA's form.
            name: what to call it in messages: its file, and its number in it.

        Raises:
            BadSampleError, BadImageError: it cannot be trained on.
        """
        name = f"{name} (id {row.get('id')!r})"
        try:
            names = image_names(row)
            # Tiles are cut first: how long a prompt becomes depends on their number.
            images = self._load_images(names, name) if names and self._tiled else None
            input_ids, labels = self.tokenize(row, len(names), self._lengths(images))
        except BadSampleError as error:
            raise with_row(error, name) from error
        item: Item = {"input_ids": input_ids, "labels": labels}
        if names:
            item |= self._collated(self._load_images(names, name) if images is None else images)
        elif self.transform is not None:
            item |= self._collated([self.transform.dummy()])
        return item

    def tokenize(self, row: Row, image_count: int, patches_per_image: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids and labels of a row, both int64 (T,); a subclass may have a layout of its own.

        Args:
            row: a row of the data.
            image_count: number of its images.
            patches_per_image: embeddings of each image, or of every image if all have the same number.

        Raises:
            BadSampleError: the row cannot be trained on.
        """
        prompt = tokenize_conversation(
            conversation_of(row),
            self.tokenizer,
            row_template(self.template, row),
            image_count=image_count,
            mm_use_im_start_end=self.mm_use_im_start_end,
            max_length=self.model_max_length,
            patches_per_image=patches_per_image,
        )
        check_system(row, prompt.prompt)
        return prompt.input_ids, prompt.labels

    @property
    def _tiled(self) -> bool:
        return self.transform is not None and self.transform.tiled

    def _lengths(self, images: list[ProcessedImage] | None) -> int | list[int]:
        """Embeddings of each image, or of every image if all have the same number."""
        if self.image_length is None:
            return 1
        if images is None:
            return self.image_length.features
        return [self.image_length(image.pixels, image.size) for image in images]

    def _load_images(self, names: list[RowImage], row_name: str) -> list[ProcessedImage]:
        if self.transform is None:
            raise FlagError(f"{row_name} has an image but the model has no vision tower; set --vision_tower")
        return [
            self.transform(row_image(self.image_folder, name, row_name), f"{row_name}: image {name}") for name in names
        ]

    def _collated(self, images: list[ProcessedImage]) -> Item:
        """What an item says of its images."""
        pixels = [image.pixels for image in images]
        if self._tiled:
            return {"image": pixels, "image_sizes": [image.size for image in images]}
        return {"image": pixels[0] if len(pixels) == 1 else torch.stack(pixels)}


def with_row(error: BadSampleError, name: str) -> BadSampleError:
    """The error with file, row and id in front; that of an image names them already."""
    return error if isinstance(error, BadImageError) else type(error)(f"{name}: {error}")


def conversation_of(row: Row) -> list[Mapping[str, Any]]:
    """Turns of a row.

    Raises:
        BadSampleError: the row has no list of turns.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSampleError(f"'conversations' must be a list of turns, not {turns!r:.80}; the row has {sorted(row)}")
    return turns
