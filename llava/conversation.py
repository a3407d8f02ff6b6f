"""Conversation templates: how turns become one prompt, and which characters of it are answers.

Upstream: `llava/conversation.py`.

A prompt is built as a list of pieces, each known to be trained on or not; label masks follow from them
(`llava/data/labels.py`). `get_prompt` is their concatenation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import ClassVar, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import BadSampleError

TAGGED_IMAGE = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"
"""How `mmtag` templates write an image."""

SYSTEM_TURN = -1
"""Number of the turn that the system text counts as."""

CHATML_HEAD = "<|im_start|>system\n"
"""Templates of the ChatML family keep it in their system text."""


class SeparatorStyle(Enum):
    """How role names, messages and separators are strung together."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()
    TOKENIZER = auto()


class Piece(NamedTuple):
    """A stretch of a prompt.

    Attributes:
        text: its characters.
        trained: True if it is an answer, with the separator that ends it.
        turn: index of the message it belongs to, `SYSTEM_TURN` for the system text.
    """

    text: str
    trained: bool
    turn: int


Message = str | tuple | None
"""Text, text with an attached image as `(text, image, mode)`, or None for an answer that is still to be generated."""


@dataclass
class Conversation:
    """A template together with the messages so far.

    Attributes:
        system: text before the first message.
        roles: names of the user and of the assistant.
        messages: `[role, message]` pairs.
        offset: number of leading messages that are an example and not shown.
        sep_style: rule by which the prompt is built.
        sep: separator after user messages (after all messages if there is no second one).
        sep2: separator after assistant messages, or None.
        version: family name; `mmtag` in it changes how images are written.
    """

    writes_bos: ClassVar[bool] = False
    """True if the prompt itself begins with the tokenizer's `<s>`, so that none is put in front."""

    system: str
    roles: tuple[str, str]
    messages: list[list] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"

    def copy(self) -> Conversation:
        """A conversation whose messages can be changed without changing this one."""
        return replace(self, messages=[list(message) for message in self.messages])

    def with_system(self, text: str) -> Conversation:
        """A copy with another system text."""
        head = CHATML_HEAD if self.system.startswith(CHATML_HEAD) else ""
        return replace(self.copy(), system=head + text)

    def append_message(self, role: str, message: Message) -> None:
        """Add a message at the end."""
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """The whole conversation as one string.

        Raises:
            BadSampleError: the template cannot write these messages.
        """
        return "".join(piece.text for piece in self.pieces())

    def pieces(self) -> list[Piece]:
        """The prompt as consecutive pieces.

        Raises:
            BadSampleError: the template cannot write these messages.
        """
        return PROMPT_STYLES[self.sep_style](self, self._texts())

    @property
    def uses_image_tags(self) -> bool:
        """True if images are written as `<Image><image></Image>`."""
        return "mmtag" in self.version

    def _texts(self) -> list[tuple[str, str | None]]:
        """`(role, text)` pairs, an image attached to the first message written out as `<image>`.

        Images attached to later messages add nothing, as upstream.
        """
        texts = [(role, message[0] if isinstance(message, tuple) else message) for role, message in self.messages]
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return texts
        role, text = texts[0]
        text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if self.uses_image_tags:
            return [(self.roles[0], TAGGED_IMAGE), (self.roles[1], "Received."), (role, text), *texts[1:]]
        return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *texts[1:]]


Texts = Sequence[tuple[str, str | None]]


def _named_roles(template: Conversation, texts: Texts, separators: tuple[str, str]) -> list[Piece]:
    """`system` sep, then `ROLE: message` and the separator of the position; `ROLE:` alone without a message."""
    pieces = [Piece(template.system + separators[0], False, SYSTEM_TURN)]
    for turn, (role, text) in enumerate(texts):
        pieces.append(Piece(f"{role}:", False, turn))
        if text:
            pieces.append(Piece(f" {text}{separators[turn % 2]}", role == template.roles[1], turn))
    return pieces


def _single(template: Conversation, texts: Texts) -> list[Piece]:
    return _named_roles(template, texts, (template.sep, template.sep))


def _two(template: Conversation, texts: Texts) -> list[Piece]:
    return _named_roles(template, texts, (template.sep, template.sep2 or ""))


def _mpt(template: Conversation, texts: Texts) -> list[Piece]:
    """`system` sep, then role, message and sep without anything between them; the role alone without a message."""
    pieces = [Piece(template.system + template.sep, False, SYSTEM_TURN)]
    for turn, (role, text) in enumerate(texts):
        pieces.append(Piece(role, False, turn))
        if text:
            pieces.append(Piece(text + template.sep, role == template.roles[1], turn))
    return pieces


def _plain(template: Conversation, texts: Texts) -> list[Piece]:
    """Messages and alternating separators; there are no role names."""
    pieces = [Piece(template.system, False, SYSTEM_TURN)]
    for turn, (_, text) in enumerate(texts):
        separator = (template.sep, template.sep2)[turn % 2]
        if text and separator is None:
            raise BadSampleError(f"this plain template has no separator after message {turn}: it holds one message")
        if text:
            pieces.append(Piece(f"{text}{separator}", turn % 2 == 1, turn))
    return pieces


def _llama_2(template: Conversation, texts: Texts) -> list[Piece]:
    """User messages in `[INST] ... [/INST]`, the system text inside the first; answers between blanks, then sep2."""
    if texts and (texts[0][0] != template.roles[0] or not texts[0][1]):
        raise BadSampleError(f"a Llama 2 conversation must begin with a message of {template.roles[0]!r}: {texts[0]}")
    pieces = []
    for turn, (_, text) in enumerate(texts):
        if text and turn % 2 == 0:
            system = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n" if turn == 0 and template.system else ""
            pieces.append(Piece(f"{template.sep}[INST] {system}{text} [/INST]", False, turn))
        elif text:
            pieces.append(Piece(f" {text} {template.sep2}", True, turn))
    if pieces:  # the tokenizer itself adds the `<s>` of the first message
        pieces[0] = pieces[0]._replace(text=pieces[0].text.removeprefix(template.sep))
    return pieces


PROMPT_STYLES: dict[SeparatorStyle, Callable[[Conversation, Texts], list[Piece]]] = {
    SeparatorStyle.SINGLE: _single,
    SeparatorStyle.TWO: _two,
    SeparatorStyle.MPT: _mpt,
    SeparatorStyle.PLAIN: _plain,
    SeparatorStyle.LLAMA_2: _llama_2,
}


def _assistant_system(speaker: str) -> str:
    return (
        f"A chat between a curious {speaker} and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the {speaker}'s questions."
    )


TAGGED_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)


def _vicuna_v1(system: str, version: str = "v1") -> Conversation:
    return Conversation(
        system, ("USER", "ASSISTANT"), sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>", version=version
    )


def _vicuna_v0(system: str, version: str = "Unknown") -> Conversation:
    return Conversation(system, ("Human", "Assistant"), sep_style=SeparatorStyle.SINGLE, sep="###", version=version)


def _llama_2_chat(system: str, sep: str = "<s>") -> Conversation:
    style = SeparatorStyle.LLAMA_2
    return Conversation(system, ("USER", "ASSISTANT"), sep_style=style, sep=sep, sep2="</s>", version="llama_v2")


def _chatml(system: str) -> Conversation:
    return Conversation(
        f"<|im_start|>system\n{system}",
        ("<|im_start|>user\n", "<|im_start|>assistant\n"),
        sep_style=SeparatorStyle.MPT,
        sep="<|im_end|>",
        version="mpt",
    )


ENERGY_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
ENERGY_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n"
)
"""The example with which Vicuna v0's own template begins; its prompts are only right with every character of it."""


def _vicuna_v0_with_example() -> Conversation:
    template = _vicuna_v0(_assistant_system("human"))
    template.append_message(template.roles[0], ENERGY_QUESTION)
    template.append_message(template.roles[1], ENERGY_ANSWER)
    template.offset = 2
    return template


_V0 = _vicuna_v0_with_example()
_V1 = _vicuna_v1(_assistant_system("user"))
_CHATML = _chatml("Answer the questions.")
_PLAIN = Conversation("", ("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")

conv_templates: dict[str, Conversation] = {
    "default": _V0,
    "v0": _V0,
    "v1": _V1,
    "vicuna_v1": _V1,
    "llama_2": _llama_2_chat(LLAMA_2_SYSTEM),
    "mistral_instruct": _llama_2_chat("", sep=""),
    "chatml_direct": _CHATML,
    "mistral_direct": _CHATML,
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": _vicuna_v0(_assistant_system("human")),
    "v0_mmtag": _vicuna_v0(TAGGED_SYSTEM, version="v0_mmtag"),
    "llava_v1": _vicuna_v1(_assistant_system("human")),
    "v1_mmtag": _vicuna_v1(TAGGED_SYSTEM, version="v1_mmtag"),
    "llava_llama_2": _llama_2_chat(LLAVA_LLAMA_2_SYSTEM),
    "mpt": _chatml(MPT_SYSTEM),
}
"""Templates by the name that `--version` and `--conv-mode` use; take a `.copy()` before adding messages."""

default_conversation = _V1


TOKENIZER_VERSION = "tokenizer"
"""Value of `--version` and `--conv-mode` that means the tokenizer's own chat template."""
