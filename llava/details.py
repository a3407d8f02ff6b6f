"""What a model did while it gave an answer, as plain data: patches and words that it kept, shares of experts.

Extensions say it (`Extension.observe`), the server hands it over, and pages draw it by its kind, whatever the
extension. Every class is JSON when `dataclasses.asdict` has read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from llava.segments import DecoderState


@dataclass(frozen=True)
class KeptPatches:
    """Which patches of an image a model worked with.

    Attributes:
        image: number of the image in the conversation, from 0.
        grid: rows and columns of patches.
        kept: indices of the kept patches, row by row.
    """

    image: int
    grid: tuple[int, int]
    kept: tuple[int, ...]
    kind: Literal["patches"] = "patches"


@dataclass(frozen=True)
class KeptWords:
    """Which tokens of a text a model remembered.

    Attributes:
        title: what the text is.
        words: each token as text, with the blank in front that it stands for, and whether it was kept.
    """

    title: str
    words: tuple[tuple[str, bool], ...]
    kind: Literal["words"] = "words"


@dataclass(frozen=True)
class Shares:
    """How something was divided, row by row, for example the tokens of a layer among its experts.

    Attributes:
        title: what was divided.
        parts: names of the parts, the same for all rows.
        rows: name of each row and the share of each part; the shares of a row add up to 1.
    """

    title: str
    parts: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    kind: Literal["shares"] = "shares"


Detail = KeptPatches | KeptWords | Shares

Said = Detail | Callable[[], Detail]
"""A detail, or a function that gives it: what takes time, such as decoding every token, is done in another thread."""


def formatted(said: Mapping[str, Sequence[Said]]) -> dict[str, list[Detail]]:
    """What was said, with the functions called."""
    return {name: [each() if callable(each) else each for each in details] for name, details in said.items()}


@dataclass(frozen=True)
class AnsweredRow:
    """A row of a batch at the moment when its answer ended.

    Attributes:
        index: of the row in the batch.
        input_ids: (T,) int64 of its prompt, one id for each image, without padding.
        output_ids: what was generated, without the token that ended it.
        tokenizer: of the model.
    """

    index: int
    input_ids: Tensor
    output_ids: Sequence[int]
    tokenizer: Any


class Observation(Protocol):
    """What an extension sees of one `generate`."""

    def enter_layer(self, index: int, state: DecoderState) -> None:
        """Called in every pass with what enters decoder layer `index`, after all extensions have changed it."""

    def details(self, answered: AnsweredRow) -> Sequence[Said]:
        """What there is to say of a row; called when its answer has ended, before the next pass.

        All rows of the batch wait for it. A function that it returns is called later, when the model may be at work on
        other requests: it must use only what is its own.
        """
