"""Errors raised at the seams, where input made by somebody else enters the project.

Each message names the file, the row or the flag, the numbers that disagree, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class LlavaError(Exception):
    """Base of every error that a user can mend."""


class FlagError(LlavaError, ValueError):
    """A command-line option is unknown, contradictory or not carried out."""


class BadSampleError(LlavaError, ValueError):
    """One row of a data file cannot be trained on: no label mask, no trained token, or a wrong number of images."""


class ImageCountError(BadSampleError):
    """The text of a row asks for more or fewer images than the row has."""


class ImageCutError(BadSampleError):
    """An image of a row begins after the longest length, so that it would be cut off."""


class NoTargetError(BadSampleError):
    """A row has no token to train on."""


class TokenBorderError(BadSampleError):
    """A token holds characters of an answer and of something else."""


class BadImageError(BadSampleError):
    """An image is missing, broken or lies outside the image folder."""


class CheckpointError(LlavaError, ValueError):
    """A checkpoint folder is incomplete, of an unknown format, or does not fit the model."""


class NotFiniteError(LlavaError, RuntimeError):
    """The model's logits are NaN or infinite, so that there is no answer.

    Args:
        message: names the question, the dtype and what to do.
        rows: rows of the batch that have no answer.
        output: (B, new) ids of the whole batch; those of the other rows are sound.
    """

    def __init__(self, message: str, rows: Sequence[int] = (), output: Any = None) -> None:
        super().__init__(message)
        self.rows, self.output = tuple(rows), output


class TrainingError(LlavaError, RuntimeError):
    """A run cannot go on: the loss is no number, a checkpoint cannot be written, or a data worker died."""


class PublishingError(LlavaError, RuntimeError):
    """A finished folder could not be uploaded; the folder itself is complete."""
