"""The words of an instruction and of an answer with what was remembered of them, from a log of decisions.

For `dynamic.visualize`, and for servers whose clients want to see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dynamic.inspection import DecisionLog
from llava.runtime.chat.token_text import TokenDecoder
from llava.runtime.drawing.patches import TextSegment, Word


@dataclass(frozen=True)
class KeptTokens:
    """The tokens of a text, and which of them were remembered; independent of the log it comes from.

    Attributes:
        title: what the text is.
        ids: of the tokens.
        kept: for each of them.
    """

    title: str
    ids: Sequence[int]
    kept: Sequence[bool]

    def segment(self, tokenizer: Any) -> TextSegment:
        """The tokens as words."""
        return TextSegment(self.title, words(self.ids, self.kept, tokenizer))


def instruction_tokens(log: DecisionLog, input_ids: Tensor, *, row: int = 0, padding: int = 0) -> KeptTokens:
    """The tokens of the last instruction.

    Args:
        log: of the answer.
        input_ids: (T,) of the prompt, one id for each image.
        row: of the batch.
        padding: positions in front of the prompt in the spliced batch.
    """
    segments = log.prompts[0].segments[row]
    start, end = segments.last_instruct
    # An image takes many positions in the sequence and one among the ids.
    shift = padding + sum(last - first - 1 for first, last in segments.images)
    ids = input_ids[start - shift : end - shift].tolist()
    kept = set(log.prompts[0].instruction(row).tolist())
    return KeptTokens("Last instruction", ids, [index in kept for index in range(len(ids))])


def answer_tokens(log: DecisionLog, output_ids: Sequence[int], *, row: int = 0) -> KeptTokens:
    """The answer; its last token was never fed, so nothing was decided about it and it is left out."""
    stored = log.stored()[row].tolist() if log.new_tokens else []
    return KeptTokens("Answer, all but the last token", list(output_ids[: len(stored)]), stored)


def instruction_segment(
    log: DecisionLog, input_ids: Tensor, tokenizer: Any, *, row: int = 0, padding: int = 0
) -> TextSegment:
    """The last instruction, token by token; arguments as those of `instruction_tokens`, and the model's tokenizer."""
    return instruction_tokens(log, input_ids, row=row, padding=padding).segment(tokenizer)


def answer_segment(log: DecisionLog, output_ids: Sequence[int], tokenizer: Any, *, row: int = 0) -> TextSegment:
    """The answer, token by token; arguments as those of `answer_tokens`, and the model's tokenizer."""
    return answer_tokens(log, output_ids, row=row).segment(tokenizer)


def words(ids: Sequence[int], kept: Sequence[bool], tokenizer: Any) -> list[Word]:
    """One `Word` for each token; its text is what it adds to the text before it.

    A character of several tokens belongs to the last of them. The time is linear in the number of tokens.
    """
    decoder = TokenDecoder(tokenizer, skip_special_tokens=False)
    texts = [decoder.push([token]) for token in ids[: len(kept)]]
    if texts:
        texts[-1] += decoder.rest()
    return [Word(text, keep) for text, keep in zip(texts, kept, strict=True)]
