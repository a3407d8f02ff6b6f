"""The prompt that a chat template writes (Jinja, see transformers' documentation), and where its answers are.

Answers follow from the template's `{% generation %}` blocks, or from rendering the conversation up to every answer and
comparing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from llava.errors import BadSampleError
from llava.segments import Span

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, str]
"""`{"role": ..., "content": text}`."""


@dataclass(frozen=True)
class ChatRenderer:
    """A chat template with what it is rendered with.

    Attributes:
        template: its text.
        special_tokens: by their names in templates (`bos_token`, ...), as `tokenizer.special_tokens_map`.
        said: what an error begins with: where the template is from, and the option that chose it.
    """

    template: str
    special_tokens: Mapping[str, str]
    said: str

    @property
    def has_generation_blocks(self) -> bool:
        """The template says by itself where answers are."""
        return GENERATION_BLOCK.search(self.template) is not None

    def prompt(
        self, messages: Sequence[Message], answers: Sequence[int], open_answer: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the characters of its answers.

        Args:
            messages: in their order.
            answers: numbers of the messages that are answers.
            open_answer: end with what the template writes in front of an answer.

        Raises:
            BadSampleError: the template refuses the messages, or does not tell where their answers lie.
        """
        text, blocks = self._render(messages, open_answer)
        if not self.has_generation_blocks:
            return text, [self._compared_span(messages, index, text) for index in answers]
        if len(blocks) != len(answers):
            raise BadSampleError(
                f"{self.said} has {len(blocks)} generation blocks for {len(answers)} answers; there must be one for "
                "each"
            )
        return text, [Span(*block) for block in blocks]

    def _render(self, messages: Sequence[Message], open_answer: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text of the messages, and the characters of its generation blocks."""
        try:
            texts, blocks = render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_generation_blocks,
                add_generation_prompt=open_answer,
                **self.special_tokens,
            )
        except TemplateError as error:
            raise BadSampleError(f"{self.said} does not take these {len(messages)} messages: {error}") from error
        return texts[0], blocks[0] if blocks else []

    def _compared_span(self, messages: Sequence[Message], index: int, prompt: str) -> Span:
        """Where the answer `index` lies: behind what is rendered without it, up to the end of what is with it."""
        before, _ = self._render(messages[:index], open_answer=True)
        after, _ = self._render(messages[: index + 1], open_answer=False)
        if not (after.startswith(before) and prompt.startswith(after)):
            raise BadSampleError(
                f"{self.said} writes a conversation differently as it grows, so it cannot be told where answer {index} "
                "lies; put '{% generation %}' blocks into the template, or use another one. Up to the answer it writes "
                f"{before[-80:]!r}, with the answer {after[max(0, len(before) - 80) :]!r:.200}"
            )
        return Span(len(before), len(after))
