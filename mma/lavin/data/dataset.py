"""LaVIN's training data: llava's data set over the rows of ScienceQA or of the chatbot mixture, in LaVIN's layout.

Everything but the order of tokens is llava's: rows, images, rows that are left out, batches. The original pads every
sample to `--max_seq_len` and cuts it there before and after the image is put in; here batches are padded to their
longest sample and cut once, at the same position. `docs/differences.md` says what that changes (nothing in the loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.data.dataset import LazySupervisedDataset
from llava.data.rows import Row, RowFiles
from llava.data.tiling import GridPinpoints, ImageLength
from llava.errors import NoTargetError
from mma.lavin.data.tokens import sample_ids

ASPECT_RATIO = "stretch"
"""In the original images are squashed to the square that the tower sees."""


class LavinDataset(LazySupervisedDataset):
    """Rows of `training_rows` or `read_mixture` as token ids, labels and pixels; see `LazySupervisedDataset`.

    Args:
        rows: the rows.
        tokenizer: see `load_tokenizer`.
        image_processor: of the tower; normalises as the checkpoint was trained.
        image_folder: folder that image names are relative to.
        max_length: positions of a sample without the modality token; the rest is cut off.
        image_aspect_ratio: how images become square, see `preprocess_image`; that of the checkpoint.
        image_grid_pinpoints: possible resolutions of `anyres`.
        image_length: embeddings of an image, see `LazySupervisedDataset`.
        on_bad_sample: `stop` or `skip`.
        skipped_file: where left out rows are listed.
        requires_image: leave out the rows without an image.
    """

    def __init__(
        self,
        rows: RowFiles,
        tokenizer: Any,
        image_processor: Any,
        *,
        image_folder: Path,
        max_length: int,
        image_aspect_ratio: str = ASPECT_RATIO,
        image_grid_pinpoints: GridPinpoints | None = None,
        image_length: ImageLength | None = None,
        on_bad_sample: str = "stop",
        skipped_file: Path | None = None,
        requires_image: bool = False,
    ) -> None:
        super().__init__(
            rows,
            tokenizer,
            image_processor,
            template=conv_templates["plain"],  # not used: `tokenize` below writes the prompt
            image_folder=image_folder,
            image_aspect_ratio=image_aspect_ratio,
            image_grid_pinpoints=image_grid_pinpoints,
            is_multimodal=True,
            mm_use_im_start_end=False,
            model_max_length=max_length,
            image_length=image_length,
            on_bad_sample=on_bad_sample,
            skipped_file=skipped_file,
            requires_image=requires_image,
        )

    def tokenize(self, row: Row, image_count: int, patches_per_image: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids and labels of a row, both int64 (T,).

        Raises:
            NoTargetError: the prompt alone fills the length, so that nothing of the answer would be trained.
        """
        prompt, answer = (turn["value"] for turn in row["conversations"])
        ids, labels = sample_ids(self.tokenizer, prompt, answer, image_count > 0)
        one = isinstance(patches_per_image, int)
        extra = image_count * (patches_per_image - 1) if one else sum(patches_per_image) - image_count
        first = int((labels != IGNORE_INDEX).nonzero()[0]) + extra
        if first >= self.model_max_length:
            raise NoTargetError(
                f"the answer begins at position {first}, but a sample is cut at {self.model_max_length} "
                f"(--max_seq_len, less the modality token); the prompt is: {prompt!r:.200}"
            )
        return ids, labels
