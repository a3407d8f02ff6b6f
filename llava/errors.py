"""Errors raised at the seams, where input made by somebody else enters the project.

Each message names the file, the row or the flag, the numbers that disagree, and what to do.
"""


class LlavaError(Exception):
    """Base of every error that a user can mend."""


class FlagError(LlavaError, ValueError):
    """A command-line option is unknown, contradictory or not carried out."""


class BadSampleError(LlavaError, ValueError):
    """One row of a data file cannot be trained on: no label mask, no trained token, or a wrong number of images."""


class ImageCountError(BadSampleError):
    """The text of a row asks for more or fewer images than the row has."""


class NoTargetError(BadSampleError):
    """A row has no token to train on."""


class TokenBorderError(BadSampleError):
    """A token holds characters of an answer and of something else."""


class BadImageError(BadSampleError):
    """An image is missing, broken or lies outside the image folder."""


class CheckpointError(LlavaError, ValueError):
    """A checkpoint folder is incomplete, of an unknown format, or does not fit the model."""


class TrainingError(LlavaError, RuntimeError):
    """A run cannot go on: the loss is no number, a checkpoint cannot be written, or a data worker died."""
