"""What ends an answer: one definition for training, the check of data, generation, the server and scores.

An answer ends at a token of generation_config's list, at the tokenizer's own, or at the one that the conversation
template writes behind an answer. A template may write a text that is not a token of the tokenizer (upstream's
`--version v1` on a Qwen): a model learns to spell it, so programs have to look for the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import TOKENIZER_VERSION, Conversation, SeparatorStyle, conv_templates
from llava.data.templates import VERSIONS_WITHOUT_TEMPLATE, select_template
from llava.data.turns import SPEAKERS, training_pieces
from llava.errors import BadSampleError, FlagError
from llava.runtime.tokenizer import encode_with_spans, eos_ids

QUESTION = f"{DEFAULT_IMAGE_TOKEN}\nquestion"
ANSWER = "answer"
"""Turns that a template is asked to write."""

MOST_NAMED = 6
"""Templates that a message suggests."""


@dataclass(frozen=True)
class TurnEnd:
    """What a template writes behind an answer, and what that is to a tokenizer.

    Attributes:
        text: without white space around it; empty if there is nothing else.
        tokens: of `text`, behind an answer.
        token: id of the one token that ends an answer, special or added to the tokenizer; None if there is none.
        trained: it belongs to what a run trains on.
        words: the part of `text` in front of a special token, which no decoded answer shows.
    """

    text: str
    tokens: tuple[str, ...] = ()
    token: int | None = None
    trained: bool = True
    words: str = ""


@dataclass(frozen=True)
class AnswerEnd:
    """What ends an answer of a model.

    Attributes:
        ids: tokens, each of which ends it.
        texts: texts that end it where a template's end is not a token.
        of_turn: the one of `ids` that the template writes; None if it writes none.
    """

    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    of_turn: int | None = None

    def before(self, ids: Sequence[int]) -> list[int]:
        """The ids in front of the first token that ends an answer."""
        end = next((place for place, token in enumerate(ids) if token in self.ids), len(ids))
        return list(ids[:end])

    def text(self, ids: Sequence[int], tokenizer: Any) -> str:
        """The text of an answer.

        Args:
            ids: as generated, with the end and the padding behind it.
            tokenizer: of the model; special tokens are left out.
        """
        text = tokenizer.decode(self.before(ids), skip_special_tokens=True)
        return text[: min((place for place in map(text.find, self.texts) if place >= 0), default=len(text))]


def turn_end(template: Conversation, tokenizer: PreTrainedTokenizerBase) -> TurnEnd | None:
    """What `template` writes behind an answer when a run is trained with it.

    Args:
        template: its messages are not looked at.
        tokenizer: see `load_tokenizer`.

    Returns:
        None if the template refuses a question with an answer, or writes the answer in other words.
    """
    try:
        pieces = training_pieces(list(SPEAKERS), [QUESTION, ANSWER], replace(template, messages=[]))
    except BadSampleError:
        return None
    index = max((index for index, piece in enumerate(pieces) if piece.trained), default=None)
    if index is None or ANSWER not in pieces[index].text:
        return None
    prompt = "".join(piece.text for piece in pieces)
    until = sum(len(piece.text) for piece in pieces[: index + 1])
    start = prompt.rindex(ANSWER, 0, until) + len(ANSWER)
    text, trained = prompt[start:until].strip(), True
    if not text:  # a generation block of a chat template may end in front of the end
        text = prompt[until:].strip()
        trained = not text
    if not text:
        return TurnEnd("")
    first = prompt.index(text, start)
    ids, spans = encode_with_spans(tokenizer, prompt)
    found = [(i, s) for i, s in zip(ids, spans, strict=True) if s.end > first and s.start < first + len(text)]
    names = tokenizer.convert_ids_to_tokens([token for token, _ in found])
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    ends = [(token, max(span.start, first)) for token, span in found if token in known and span.start >= start]
    token = ends[0][0] if ends and ends[0][0] == found[0][0] else None
    words = prompt[first : ends[0][1] if ends else first + len(text)].strip()
    return TurnEnd(text, tuple(names), token, trained, words)


def answer_end(
    turn: TurnEnd | None, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> AnswerEnd:
    """What ends an answer of a model: every program takes it from here.

    Args:
        turn: of the template, see `turn_end`; None if prompts have no template.
        tokenizer: its end-of-sequence token counts whether or not `generation_config` names it.
        generation_config: of the model.
    """
    of_turn = None if turn is None else turn.token
    ids = [*eos_ids(generation_config), tokenizer.eos_token_id, of_turn]
    texts = (turn.words,) if turn is not None and turn.words else ()
    return AnswerEnd(tuple(dict.fromkeys(token for token in ids if token is not None)), texts, of_turn)


def end_problem(template: Conversation, turn: TurnEnd | None, tokenizer: Any, version: str) -> str | None:
    """Why a model trained with `template` would not end its answers by itself, and what to do; None if it would.

    Args:
        template: that `version` means. Captions of the `plain` template end with a line: nobody asks by it.
        turn: its end.
        tokenizer: of the run.
        version: value of `--version`.
    """
    if turn is None or (turn.token is not None and turn.trained):
        return None
    said = f"--version {version}: "
    if not turn.text:
        if template.sep_style is SeparatorStyle.PLAIN:
            return None
        said += "the template writes nothing but white space behind an answer, so the model never learns to end one; "
        return said + _advice(tokenizer, version, "let the template write the end-of-sequence token behind answers")
    if not turn.trained:
        return (
            f"{said}the template's generation block ends in front of {turn.text!r}, so the end of an answer is not "
            "trained; move {% endgeneration %} behind it"
        )
    count = "1 ordinary token" if len(turn.tokens) == 1 else f"{len(turn.tokens)} ordinary tokens"
    said += (
        f"an answer ends with {turn.text!r}, which is not one end token of this tokenizer but {count} "
        f"{list(turn.tokens)}; the model learns to write it as text, which ends an answer in the programs of this "
        "project but not elsewhere; "
    )
    return said + _advice(tokenizer, version, f"add {turn.text!r} to the base's tokenizer as a special token")


def _advice(tokenizer: Any, version: str, otherwise: str) -> str:
    names = [name for name in fitting_versions(tokenizer) if name != version][:MOST_NAMED]
    return f"pass --version {' or '.join(names)}, whose end is one token here, or {otherwise}" if names else otherwise


def fitting_versions(tokenizer: Any) -> list[str]:
    """Values of `--version` whose templates end an answer with one token of this tokenizer, its own template first."""
    distinct = [name for name in conv_templates if name not in VERSIONS_WITHOUT_TEMPLATE]
    # Some templates have two names.
    distinct = [name for place, name in enumerate(distinct) if not _is_among(name, distinct[:place])]
    fitting = []
    for name in (TOKENIZER_VERSION, *distinct):
        try:
            end = turn_end(select_template(name, tokenizer), tokenizer)
        except FlagError:  # it has no chat template
            continue
        if end is not None and end.token is not None and end.trained:
            fitting.append(name)
    return fitting


def _is_among(name: str, names: Sequence[str]) -> bool:
    return any(conv_templates[name] is conv_templates[other] for other in names)
