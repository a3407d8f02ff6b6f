"""Kinds of problems of the rows of a data file; nothing here needs torch."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """Kinds of problems, in the order in which they are reported."""

    UNREADABLE_ROW = "unreadable row"
    BAD_TURNS = "bad turns"
    BAD_IMAGE_ENTRY = "bad image entry"
    MISSING_IMAGE = "missing image"
    BROKEN_IMAGE = "broken image"
    IMAGE_COUNT = "image count"
    IMAGE_CUT = "image cut off"
    IMAGE_WORD = "image word"
    TOKEN_BORDER = "token border"
    NO_TARGET = "no target"
    TOO_LONG = "too long"
    TRUNCATED = "truncated"
    DUPLICATE_ID = "duplicate id"
    ANSWER_END = "answer end"


EXPLANATIONS = {
    Kind.UNREADABLE_ROW: "no JSON, or no JSON object",
    Kind.BAD_TURNS: "the conversation is malformed, or its speakers do not take turns",
    Kind.BAD_IMAGE_ENTRY: "'image' is neither a file name nor a list of file names, or another key names images",
    Kind.MISSING_IMAGE: "the image file is missing or lies outside the image folder",
    Kind.BROKEN_IMAGE: "the image file cannot be read",
    Kind.IMAGE_COUNT: "the text has more or fewer <image> than the row has images",
    Kind.IMAGE_CUT: "an image begins behind --model_max_length",
    Kind.IMAGE_WORD: "a row without image says <image> within its text, which is trained on as a word",
    Kind.TOKEN_BORDER: "a token lies across the border of an answer",
    Kind.NO_TARGET: "there is no answer to train on",
    Kind.TOO_LONG: "the first answer begins behind --model_max_length",
    Kind.TRUNCATED: "a part of the answers lies behind --model_max_length and is not trained on",
    Kind.DUPLICATE_ID: "another row has the same id",
    Kind.ANSWER_END: "no single token ends an answer of this template; a matter of --version, not of the rows",
}

TRAINABLE = frozenset({Kind.IMAGE_WORD, Kind.TRUNCATED, Kind.DUPLICATE_ID, Kind.ANSWER_END})
"""Kinds that training takes as they are; rows with any other stop it, or are left out (`--on_bad_sample skip`)."""
