"""The training data set (upstream `LazySupervisedDataset` in `llava/train/train.py`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llava.conversation import Conversation
from llava.data.image_names import image_names
from llava.data.rows import Row, RowFiles, open_rows
from llava.data.samples import ON_BAD_SAMPLE, Item, Samples, conversation_of, with_row
from llava.data.sizes import IMAGE_LENGTH, UNCOUNTED, Size
from llava.data.skipped import append_skipped
from llava.data.tiling import GridPinpoints, ImageLength
from llava.errors import BadSampleError, FlagError, LlavaError
from llava.runtime.failure import failed_item

__all__ = ["ON_BAD_SAMPLE", "Item", "LazySupervisedDataset", "conversation_of"]

logger = logging.getLogger(__name__)


class LazySupervisedDataset(Samples, Dataset[Item]):
    """Rows of a LLaVA data file as token ids, labels and pixel values, made when they are asked for.

    An item has `input_ids` and `labels`, int64 (T,), and `image`, float32 (3, height, width), or (N, 3, height, width)
    with N > 1 images. With `anyres` it is a list of (tiles, 3, height, width), and `image_sizes` gives each image's
    width and height in pixels. With `is_multimodal` a row without image has a black image; it adds nothing but keeps
    batches equal in kind.

    Args:
        data_path: JSON list or JSONL file, or several of them; or rows that were opened already.
        tokenizer: see `load_tokenizer`.
        image_processor: see `load_image_processor`; may be None without `is_multimodal`.
        template: template without messages, see `select_template`.
        image_folder: folder that the file's image names are relative to; may be None if it names none.
        image_aspect_ratio: see `preprocess_image`.
        image_grid_pinpoints: possible resolutions of `anyres`.
        is_multimodal: the model has a vision tower.
        mm_use_im_start_end: write `<im_start>` and `<im_end>` around images.
        model_max_length: longest sample in tokens.
        image_length: embeddings of an image; only used to see whether a target lies within `model_max_length`. None
            counts an image as one.
        on_bad_sample: `stop` raises the error of a bad row; `skip` writes it to `skipped_file` and gives the next good
            row of the same modality in its place, so that steps and batch shapes stay as they are; where no row is
            text, one with an image takes the place of a row without.
        skipped_file: see `llava/data/skipped.py`.
        requires_image: leave out the rows without an image.

    Attributes:
        left_out: number of rows that `requires_image` left out.

    Raises:
        FlagError: options contradict each other, or the file is missing or empty, or no row is left; on access, a row
            names an image that the options give no way to load.
        BadSampleError: on access, a row cannot be trained on; the message names file, row and id.
        BadImageError: on access, as above, because of its image.
    """

    def __init__(
        self,
        data_path: RowFiles | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
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
        requires_image: bool = False,
    ) -> None:
        super().__init__(
            tokenizer,
            image_processor,
            template=template,
            image_folder=image_folder,
            image_aspect_ratio=image_aspect_ratio,
            image_grid_pinpoints=image_grid_pinpoints,
            is_multimodal=is_multimodal,
            mm_use_im_start_end=mm_use_im_start_end,
            model_max_length=model_max_length,
            image_length=image_length,
            on_bad_sample=on_bad_sample,
            skipped_file=skipped_file,
        )
        self.rows = data_path if isinstance(data_path, RowFiles) else open_rows(data_path)
        self._bad_rows: set[int] = set()
        self.left_out = self._leave_out_text() if requires_image else 0

    def _leave_out_text(self) -> int:
        """Keep the rows with an image and return the number of the others."""
        sizes = self.rows.sizes
        with_image = sizes["images"] > 0
        for row in np.flatnonzero(sizes["words"] == UNCOUNTED).tolist():  # its turns or its images cannot be read
            with_image[row] = self._has_image(row)
        rows = np.flatnonzero(with_image)
        if not len(rows):
            raise FlagError(
                f"--requires_image True: none of the {len(self.rows)} rows of {self.rows.paths} has an image"
            )
        before, self.rows = len(self.rows), self.rows.select(rows)
        self._bad_rows.clear()  # numbers of rows before the choice
        return before - len(rows)

    def _has_image(self, row: int) -> bool:
        """False also for a row that cannot be read, which is listed, if bad rows are skipped."""
        try:
            return bool(image_names(self.rows[row]))
        except BadSampleError as error:
            if self.on_bad_sample == "stop":
                raise with_row(error, self.rows.name(row)) from error
            self._skip(row, error)
            return False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        try:
            return self._item(index)
        except LlavaError as error:
            return failed_item(error)  # raises, outside of worker processes

    def _item(self, index: int) -> Item:
        if self.on_bad_sample == "stop":
            return self.load(index)
        has_image = self._size(index).images > 0
        # A row that seems to be text may have lost its image: where no row is text, one with an image replaces it.
        for any_kind in (False, True) if not has_image and self.transform is not None else (False,):
            for candidate in (*range(index, len(self)), *range(index)):
                same_kind = (self._size(candidate).images > 0) == has_image
                if candidate in self._bad_rows or not (same_kind or any_kind):
                    continue
                try:
                    return self.load(candidate)
                except BadSampleError as error:
                    self._skip(candidate, error)
        kind = "with" if has_image else "without"
        raise BadSampleError(f"{self.rows.paths}: no row {kind} image can be trained on; see {self.skipped_file}")

    @property
    def lengths(self) -> list[int]:
        """Words of each row, and 128 for each image; no image is opened (`llava/data/sizes.py`)."""
        return (self._sizes["words"].astype(np.int64) + IMAGE_LENGTH * self._sizes["images"]).tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each row, negative for a row without image.

        Raises:
            FlagError: a row has no words, so that its sign is lost.
        """
        words = self._sizes["words"].astype(np.int64)
        empty = np.flatnonzero(words == 0)
        if len(empty):
            raise FlagError(
                f"--group_by_modality_length: {self.rows.name(int(empty[0]))} has no words, so whether it has an image "
                "cannot be seen from its length; remove the row"
            )
        return np.where(self._sizes["images"] > 0, words, -words).tolist()

    @cached_property
    def _sizes(self) -> np.ndarray:
        """Sizes of all rows, `SIZES` (rows,), as `_size` gives them."""
        sizes = self.rows.sizes.copy()
        for row in np.flatnonzero(sizes["words"] == UNCOUNTED).tolist():
            sizes[row] = self._size(row)
        if self.on_bad_sample == "skip":
            sizes["words"] = np.maximum(sizes["words"], 1)
        return sizes

    def _size(self, index: int) -> Size:
        """Size of a row; one that has no words or cannot be read counts as one word if bad rows are skipped."""
        skips = self.on_bad_sample == "skip"
        size = self.rows.size(index)
        if size is None:
            return Size(1, 0) if skips else self._why_uncounted(index)
        return Size(max(size.words, int(skips)), size.images)

    def _why_uncounted(self, index: int) -> Size:
        """Raise what is wrong with a row whose size could not be counted."""
        row = self.rows[index]
        try:
            words = sum(len(turn["value"].split()) for turn in row["conversations"])
        except (LookupError, TypeError, AttributeError) as error:
            raise BadSampleError(f"{self.rows.name(index)}: its turns cannot be read: {error!r}") from error
        return Size(words, _image_count(row, self.rows.name(index)))

    def load(self, index: int) -> Item:
        """The item of exactly this row, with no other in the place of a bad one.

        Raises:
            BadSampleError, BadImageError: it cannot be trained on.
        """
        return self.prepare(self.rows[index], self.rows.name(index))

    def _skip(self, index: int, error: BadSampleError) -> None:
        """Remember and list a bad row."""
        self._bad_rows.add(index)
        try:
            sample_id = self.rows[index].get("id")
        except BadSampleError:
            sample_id = None
        append_skipped(self.skipped_file, self.rows.source(index), sample_id, str(error))
        logger.warning("skipped a sample: %s", error)


def _image_count(row: Row, name: str) -> int:
    """Number of a row's images.

    Raises:
        BadSampleError: as `image_names`, with the row's file and number in front.
    """
    try:
        return len(image_names(row))
    except BadSampleError as error:
        raise with_row(error, name) from error
