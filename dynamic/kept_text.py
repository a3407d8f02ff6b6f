"""The words of an instruction and of an answer with what was remembered of them, from a log of decisions.

For `dynamic.visualize`, and for servers whose clients want to see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dynamic.inspection import DecisionLog
from llava.runtime.drawing.patches import TextSegment, Word


def instruction_segment(
    log: DecisionLog, input_ids: Tensor, tokenizer: Any, *, row: int = 0, padding: int = 0
) -> TextSegment:
    """The last instruction, token by token.

    Args:
        log: of the answer.
        input_ids: (T,) of the prompt, one id for each image.
        tokenizer: of the model.
        row: of the batch.
        padding: positions in front of the prompt in the spliced batch.
    """
    segments = log.prompts[0].segments[row]
    start, end = segments.last_instruct
    # An image takes many positions in the sequence and one among the ids.
    shift = padding + sum(last - first - 1 for first, last in segments.images)
    ids = input_ids[start - shift : end - shift].tolist()
    kept = set(log.prompts[0].instruction(row).tolist())
    return TextSegment("Last instruction", words(ids, [index in kept for index in range(len(ids))], tokenizer))


def answer_segment(log: DecisionLog, output_ids: Sequence[int], tokenizer: Any, *, row: int = 0) -> TextSegment:
    """The answer; its last token was never fed, so nothing was decided about it and it is left out."""
    stored = log.stored()[row].tolist() if log.new_tokens else []
    return TextSegment("Answer, all but the last token", words(output_ids[: len(stored)], stored, tokenizer))


def words(ids: Sequence[int], kept: Sequence[bool], tokenizer: Any) -> list[Word]:
    """One `Word` for each token; its text is what it adds to the text before it."""
    found, before = [], ""
    for end, keep in enumerate(kept, start=1):
        text = tokenizer.decode(list(ids[:end]))
        found.append(Word(text[len(before) :], keep))
        before = text
    return found
