"""Sample answers with their images as tables in wandb and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

COLUMNS = ("update", "image", "question", "answer", "label", "score")
WIDEST = 448
"""Pixels of the longer side of an image that is shown."""


@dataclass(frozen=True)
class ShownAnswer:
    """One row of a table.

    Attributes:
        question: as it was asked.
        answer: what the model wrote.
        label: the right answer, or None if that is not known here.
        score: of the answer, or None.
        images: of the question.
    """

    question: str
    answer: str
    label: str | None
    score: float | None
    images: Sequence[Image.Image]

    def one_image(self) -> Image.Image | None:
        """The images side by side, none larger than `WIDEST`: a cell of a table holds one. None without images."""
        copies = [image.convert("RGB") for image in self.images]
        for copy in copies:
            copy.thumbnail((WIDEST, WIDEST))
        if len(copies) < 2:
            return copies[0] if copies else None
        sheet = Image.new("RGB", (sum(copy.width for copy in copies), max(copy.height for copy in copies)))
        left = 0
        for copy in copies:
            sheet.paste(copy, (left, 0))
            left += copy.width
        return sheet


def show_answers(callbacks: Sequence[TrainerCallback], name: str, rows: Sequence[ShownAnswer], update: int) -> None:
    """Put a table into every place that the run reports to and that can show one.

    Args:
        callbacks: of the Trainer; those that report to wandb and TensorBoard are found among them.
        name: of the questions; the table is called `eval/<name>/answers`.
        rows: what is shown.
        update: after which the answers were given.
    """
    for callback in callbacks:
        if isinstance(callback, WandbCallback):
            _show_in_wandb(f"eval/{name}/answers", rows, update)
        elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            _show_in_tensorboard(callback.tb_writer, f"eval/{name}/answers", rows, update)


def _show_in_wandb(key: str, rows: Sequence[ShownAnswer], update: int) -> None:
    import wandb

    if wandb.run is None:
        return
    table = wandb.Table(columns=list(COLUMNS))
    for row in rows:
        image = row.one_image()
        shown = None if image is None else wandb.Image(image)
        table.add_data(update, shown, row.question, row.answer, row.label, row.score)
    wandb.run.log({key: table, "train/global_step": update})


def _show_in_tensorboard(writer: Any, key: str, rows: Sequence[ShownAnswer], update: int) -> None:
    """A table in Markdown, which names the images: TensorBoard shows those by themselves."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for number, row in enumerate(rows, start=1):
        image, name = row.one_image(), None
        if image is not None:
            name = f"{key}/{number}"
            writer.add_image(name, np.asarray(image), update, dataformats="HWC")
        cells = (update, name, row.question, row.answer, row.label, row.score)
        lines.append(" | ".join(_cell(value) for value in cells))
    writer.add_text(key, "\n".join(f"| {line} |" for line in lines), update)


def _cell(value: object) -> str:
    """A value that stays within its cell."""
    return "" if value is None else " ".join(str(value).split()).replace("|", "\\|")
