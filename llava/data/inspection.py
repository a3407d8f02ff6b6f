"""What is wrong with a row of a data file, and how long it is; and with rows beside each other.

Uses the code that prepares samples for training, so that what passes here passes there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.data.dataset import conversation_of
from llava.data.image_names import RowImage, StoredImage, image_names
from llava.data.images import image_path, row_image, row_image_size
from llava.data.kinds import Kind
from llava.data.labels import TokenizedPrompt, image_starts, refuse_cut_images, tokenize_conversation
from llava.data.rows import Row, RowFiles
from llava.data.templates import check_system, row_template
from llava.data.tiling import ImageLength
from llava.errors import BadSampleError, ImageCountError, ImageCutError, NoTargetError, TokenBorderError

ERROR_KINDS = {ImageCountError: Kind.IMAGE_COUNT, TokenBorderError: Kind.TOKEN_BORDER, NoTargetError: Kind.NO_TARGET}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of one row.

    Attributes:
        kind: see `Kind`.
        message: what exactly is wrong.
    """

    kind: Kind
    message: str


@dataclass(slots=True)
class RowReport:
    """What was found in one row.

    Attributes:
        file: data file.
        row: number in the file, from 0.
        sample_id: its `id`.
        problems: everything that is wrong with it.
        images: number of images that it names.
        turns: number of turns.
        tokens: positions of the whole sample, each image counted with all its patches; None if it has no prompt.
        trained: positions that are trained on, if nothing were cut off.
        cut: how many of those lie behind the longest length.
    """

    file: str
    row: int
    sample_id: Any = None
    problems: list[Problem] = field(default_factory=list)
    images: int = 0
    turns: int = 0
    tokens: int | None = None
    trained: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Settings:
    """How the data would be trained on.

    Attributes:
        template: see `select_template`.
        tokenizer: see `load_tokenizer`.
        image_folder: folder that image names are relative to.
        image_length: says how many positions an image takes in a sample.
        max_length: longest sample in positions.
        mm_use_im_start_end: `<im_start>` and `<im_end>` stand around images.
        read_images: read every image file whole; else only look whether it is there.
        check_size: takes the size of an image and `name`, and raises where training would refuse it.
    """

    template: Conversation
    tokenizer: PreTrainedTokenizerBase
    image_folder: str | os.PathLike[str] | None
    image_length: ImageLength
    max_length: int
    mm_use_im_start_end: bool = False
    read_images: bool = True
    check_size: Callable[..., None] | None = None

    def image_lengths(self, row: Row) -> list[int]:
        """Positions that each image of a row takes; one whose file cannot be read counts as one tile."""
        names = image_names(row)
        if self.image_length.resolutions is None:
            return [self.image_length.features] * len(names)
        lengths = []
        for name in names:
            if self.image_folder is None and not isinstance(name, StoredImage):
                lengths.append(self.image_length.features)
                continue
            try:
                lengths.append(self.image_length.of_size(row_image_size(self.image_folder, name)))
            except BadSampleError:  # the row has a problem of its own for this image
                lengths.append(self.image_length.features)
        return lengths

    def prompt(self, row: Row, max_length: int | None = None) -> TokenizedPrompt:
        """Token ids and labels of a row.

        Raises:
            BadSampleError: the row has none.
        """
        prompt = tokenize_conversation(
            conversation_of(row),
            self.tokenizer,
            row_template(self.template, row),
            image_count=len(image_names(row)),
            mm_use_im_start_end=self.mm_use_im_start_end,
            max_length=max_length,
            patches_per_image=self.image_lengths(row),
        )
        check_system(row, prompt.prompt)
        return prompt


class RowReports(Dataset[RowReport]):
    """The report of every row, made when it is asked for, so that several processes can share the work."""

    def __init__(self, rows: RowFiles, settings: Settings) -> None:
        self.rows = rows
        self.settings = settings

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> RowReport:
        path, number = self.rows.source(index)
        report = RowReport(str(path), number)
        try:
            row = self.rows[index]
        except BadSampleError as error:
            report.problems.append(Problem(Kind.UNREADABLE_ROW, str(error)))
            return report
        report.sample_id = row.get("id")
        turns = row.get("conversations")
        report.turns = len(turns) if isinstance(turns, list) else 0
        try:
            names = image_names(row)
        except BadSampleError as error:
            report.problems.append(Problem(Kind.BAD_IMAGE_ENTRY, str(error)))
            return report
        report.images = len(names)
        report.problems += [problem for name in names for problem in self._image_problems(name)]
        self._measure(row, report)
        return report

    def _image_problems(self, name: RowImage) -> list[Problem]:
        folder = self.settings.image_folder
        is_stored = isinstance(name, StoredImage)
        if folder is None and not is_stored:
            return [Problem(Kind.MISSING_IMAGE, f"names the image {name!r}, but no --image_folder is given")]
        try:
            if not is_stored:
                image_path(folder, name)
        except BadSampleError as error:
            return [Problem(Kind.MISSING_IMAGE, str(error).removeprefix(": "))]
        try:
            if self.settings.read_images:
                image = row_image(folder, name)
                if self.settings.check_size is not None:
                    self.settings.check_size(image.size, name=f"image {name}")
        except BadSampleError as error:
            return [Problem(Kind.BROKEN_IMAGE, str(error).removeprefix(": "))]
        return []

    def _measure(self, row: Row, report: RowReport) -> None:
        """Lengths of a row, and the problems of its text."""
        settings = self.settings
        try:
            prompt = settings.prompt(row)
        except BadSampleError as error:
            report.problems.append(Problem(ERROR_KINDS.get(type(error), Kind.BAD_TURNS), str(error)))
            return
        if not report.images and DEFAULT_IMAGE_TOKEN in prompt.prompt:
            report.problems.append(Problem(Kind.IMAGE_WORD, f"{DEFAULT_IMAGE_TOKEN} in the text, and no image"))
        lengths = settings.image_lengths(row)
        positions, report.tokens = _positions(prompt, lengths)
        targets = [
            position for position, label in zip(positions, prompt.labels.tolist(), strict=True) if label != IGNORE_INDEX
        ]
        report.trained = len(targets)
        report.cut = sum(position >= settings.max_length for position in targets)
        if report.cut == report.trained:
            message = f"the first answer begins at position {targets[0]}, a sample is cut at {settings.max_length}"
            report.problems.append(Problem(Kind.TOO_LONG, message))
            return
        try:
            refuse_cut_images(image_starts(prompt.input_ids, lengths), settings.max_length)
        except ImageCutError as error:
            report.problems.append(Problem(Kind.IMAGE_CUT, str(error)))
        if report.cut:
            message = (
                f"{report.cut} of {report.trained} trained tokens are cut off: {report.tokens} positions, "
                f"a sample is cut at {settings.max_length}"
            )
            report.problems.append(Problem(Kind.TRUNCATED, message))


def _positions(prompt: TokenizedPrompt, image_lengths: Sequence[int]) -> tuple[list[int], int]:
    """Position of each token once every image has its full length, and the number of all positions."""
    lengths = iter(image_lengths)
    positions, position = [], 0
    for index in prompt.input_ids.tolist():
        positions.append(position)
        position += next(lengths) if index == IMAGE_TOKEN_INDEX else 1
    return positions, position


def mark_duplicates(reports: Sequence[RowReport]) -> None:
    """Add a problem to every row whose id an earlier row has."""
    first: dict[str, RowReport] = {}
    for report in reports:
        if report.sample_id is None:
            continue
        other = first.setdefault(repr(report.sample_id), report)
        if other is not report:
            message = f"the id {report.sample_id!r} is also that of {other.file}, row {other.row}"
            report.problems.append(Problem(Kind.DUPLICATE_ID, message))


def thumbnail(folder: str | os.PathLike[str] | None, name: RowImage, side: int) -> Image.Image:
    """A small copy of an image, at most `side` pixels wide and high.

    Raises:
        BadImageError: see `row_image`.
    """
    image = row_image(folder, name)
    image.thumbnail((side, side))
    return image
