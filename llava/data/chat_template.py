"""The tokenizer's own chat template as a conversation template (`--version tokenizer`, `--conv-mode tokenizer`).

The template (Jinja, see transformers' documentation) writes the prompt. Where answers lie in it follows from its
`{% generation %}` blocks, or from rendering the conversation up to every answer and comparing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llava.conversation import SYSTEM_TURN, TOKENIZER_VERSION, Conversation, Piece, SeparatorStyle
from llava.errors import BadSampleError, FlagError
from llava.segments import Span

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class ChatTemplate(Conversation):
    """A conversation that the tokenizer's chat template writes.

    Attributes:
        tokenizer: its template and special tokens are used; it is not changed.
    """

    tokenizer: Any = None

    writes_bos = True

    def pieces(self) -> list[Piece]:
        """The prompt as consecutive pieces; a last answer that is None is left open for generation.

        Raises:
            BadSampleError: the template refuses the messages, or does not tell where their answers lie.
        """
        texts = self._texts()
        open_answer = bool(texts) and texts[-1][0] == self.roles[1] and texts[-1][1] is None
        messages = [{"role": role, "content": text or ""} for role, text in texts[: len(texts) - open_answer]]
        answers = [index for index, message in enumerate(messages) if message["role"] == self.roles[1]]
        prompt, blocks = self._render(messages, add_generation_prompt=open_answer)
        if self._has_generation_blocks:
            spans = self._block_spans(blocks, answers)
        else:
            spans = [self._compared_span(messages, index, prompt) for index in answers]
        pieces: list[Piece] = []
        end = 0
        for index, span in zip(answers, spans, strict=True):
            # Blanks in front of an answer go with it: tokenizers make one token of a blank and the word behind it.
            start = end + len(prompt[end : span.start].rstrip(" "))
            pieces.append(Piece(prompt[end:start], False, SYSTEM_TURN if index == 0 else index - 1))
            pieces.append(Piece(prompt[start : span.end], bool(messages[index]["content"]), index))
            end = span.end
        rest = prompt[end:].rstrip(" ") if open_answer else prompt[end:]
        return [*pieces, Piece(rest, False, len(messages))]

    @property
    def _has_generation_blocks(self) -> bool:
        return GENERATION_BLOCK.search(self.tokenizer.get_chat_template()) is not None

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text of the messages, and the characters of its generation blocks."""
        try:
            texts, blocks = render_jinja_template(
                [messages],
                chat_template=self.tokenizer.get_chat_template(),
                return_assistant_tokens_mask=self._has_generation_blocks,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise BadSampleError(
                f"--version {TOKENIZER_VERSION}: the tokenizer's chat template does not take these {len(messages)} "
                f"messages: {error}"
            ) from error
        return texts[0], blocks[0] if blocks else []

    def _block_spans(self, blocks: list[tuple[int, int]], answers: list[int]) -> list[Span]:
        if len(blocks) != len(answers):
            raise BadSampleError(
                f"--version {TOKENIZER_VERSION}: the tokenizer's chat template has {len(blocks)} generation blocks for "
                f"{len(answers)} answers; there must be one for each"
            )
        return [Span(*block) for block in blocks]

    def _compared_span(self, messages: list[dict[str, str]], index: int, prompt: str) -> Span:
        """Where the answer `index` lies: behind what is rendered without it, up to the end of what is with it."""
        before, _ = self._render(messages[:index], add_generation_prompt=True)
        after, _ = self._render(messages[: index + 1], add_generation_prompt=False)
        if not (after.startswith(before) and prompt.startswith(after)):
            raise BadSampleError(
                f"--version {TOKENIZER_VERSION}: the tokenizer's chat template writes a conversation differently as it "
                f"grows, so it cannot be told where answer {index} lies; put '{{% generation %}}' blocks into the "
                f"template, or use another --version. Up to the answer it writes {before[-80:]!r}, with the answer "
                f"{after[max(0, len(before) - 80) :]!r:.200}"
            )
        return Span(len(before), len(after))


def chat_template(tokenizer: PreTrainedTokenizerBase | None) -> ChatTemplate:
    """The tokenizer's chat template, without messages.

    Raises:
        FlagError: there is no tokenizer, or it has no template.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise FlagError(
            f"--version {TOKENIZER_VERSION}: this tokenizer has no chat template (no chat_template in its "
            "tokenizer_config.json and no chat_template.jinja beside it); name another template"
        )
    return ChatTemplate(
        system="",
        roles=("user", "assistant"),
        sep_style=SeparatorStyle.TOKENIZER,
        sep="",
        version=TOKENIZER_VERSION,
        tokenizer=tokenizer,
    )
