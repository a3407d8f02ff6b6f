"""The tokenizer's own chat template as a conversation template (`--version tokenizer`, `--conv-mode tokenizer`).

`llava.runtime.chat.rendering` writes the prompt and finds the answers in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava.conversation import SYSTEM_TURN, TOKENIZER_VERSION, Conversation, Piece, SeparatorStyle
from llava.errors import FlagError
from llava.runtime.chat.rendering import ChatRenderer


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
        prompt, spans = self._renderer.prompt(messages, answers, open_answer)
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
    def _renderer(self) -> ChatRenderer:
        said = f"--version {TOKENIZER_VERSION}: the tokenizer's chat template"
        return ChatRenderer(self.tokenizer.get_chat_template(), self.tokenizer.special_tokens_map, said)


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
