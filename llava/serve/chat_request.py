"""Reading a request of OpenAI's chat API: what is asked, checked by hand so that every refusal names its parameter.

Nothing that would change the answer is ignored in silence: a parameter that is not carried out is refused, unless it
has the value that means nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava.conversation import Conversation
from llava.errors import FlagError, LlavaError
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.prompts import add_image_markers, new_conversation

HARMLESS = ("user", "metadata", "store", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key")
"""Parameters without influence on the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}
"""Parameters that are not carried out, and the values that ask for nothing."""

SYSTEM_HEAD = "<|im_start|>system\n"
"""Templates of the ChatML family keep it in their system text."""

READ = ("model", "messages", "stream", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed")


class RequestError(LlavaError):
    """A request that cannot be carried out.

    Args:
        message: what is wrong and what to do.
        param: the parameter.
        status: of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing, and the limits of the server.

    Attributes:
        temperature: of sampling; 0 is greedy.
        max_new_tokens: tokens of an answer.
        token_limit: the most that a request may ask for.
        max_images: images of one request.
    """

    temperature: float = 0.2
    max_new_tokens: int = 512
    token_limit: int = 4096
    max_images: int = 16


@dataclass(frozen=True)
class Message:
    """One message: `images` are addresses, in order."""

    role: str
    text: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class ChatRequest:
    """A request that has been checked.

    Attributes:
        model: name of the model that is asked for.
        messages: alternately of user and assistant, the first one perhaps of the system.
        options: of decoding.
        stops: strings that end the answer.
        stream: send the answer as it comes.
        include_usage: end the stream with the numbers of tokens.
    """

    model: str
    messages: tuple[Message, ...]
    options: GenerationOptions
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool

    @property
    def images(self) -> tuple[str, ...]:
        """Addresses of all images, in the order of their markers."""
        return tuple(url for message in self.messages for url in message.images)


def read_request(body: Any, defaults: Defaults) -> ChatRequest:
    """Check the decoded JSON of a request.

    Raises:
        RequestError: names the parameter, what it is and what it may be.
    """
    if not isinstance(body, Mapping):
        raise RequestError("the body is no JSON object")
    _refuse_unknown(body)
    messages = _messages(body.get("messages"))
    count = sum(len(message.images) for message in messages)
    if count > defaults.max_images:
        raise RequestError(f"{count} images; this server takes up to {defaults.max_images}", "messages")
    stream = _typed(body, "stream", bool, False)
    stream_options = body.get("stream_options") or {}
    return ChatRequest(
        model=_typed(body, "model", str, ""),
        messages=messages,
        options=_options(body, defaults),
        stops=_stops(body.get("stop")),
        stream=stream,
        include_usage=bool(isinstance(stream_options, Mapping) and stream_options.get("include_usage")),
    )


def conversation_of(request: ChatRequest, conv_mode: str, tokenizer: Any, mm_use_im_start_end: bool) -> Conversation:
    """The conversation with the answer still open.

    Images of a message come before its text, each on a line of its own, unless the text says by
    `<image-placeholder>` where they go.

    Raises:
        BadSampleError: markers in a text do not fit its images.
        RequestError: the template has no system text.
    """
    conversation = new_conversation(conv_mode, tokenizer)
    for number, message in enumerate(request.messages):
        if message.role == "system":
            head = SYSTEM_HEAD if conversation.system.startswith(SYSTEM_HEAD) else ""
            conversation.system = head + message.text
            continue
        text = add_image_markers(
            message.text,
            len(message.images),
            mm_use_im_start_end=mm_use_im_start_end,
            where=f"messages[{number}]",
        )
        conversation.append_message(conversation.roles[message.role == "assistant"], text)
    conversation.append_message(conversation.roles[1], None)
    if request.messages[0].role == "system" and request.messages[0].text not in conversation.get_prompt():
        raise RequestError(f"the template {conv_mode} has no place for a system message", "messages")
    return conversation


def _refuse_unknown(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in READ or name in HARMLESS or value is None:
            continue
        if name not in NEUTRAL:
            raise RequestError(f"the parameter '{name}' is not known here", name)
        if value not in NEUTRAL[name]:
            raise RequestError(f"{name} = {value!r} is not carried out here; leave it out", name)


def _typed(body: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """A parameter of one type; bool is no number."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestError(f"{name} = {value!r} has the wrong type", name)
    return value


def _options(body: Mapping[str, Any], defaults: Defaults) -> GenerationOptions:
    if body.get("max_completion_tokens") is not None and body.get("max_tokens") is not None:
        raise RequestError("give max_completion_tokens or max_tokens, not both", "max_tokens")
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    tokens = _typed(body, name, int, defaults.max_new_tokens)
    if not 1 <= tokens <= defaults.token_limit:
        raise RequestError(f"{name} = {tokens}; this server takes 1 to {defaults.token_limit}", name)
    temperature = float(_typed(body, "temperature", (int, float), defaults.temperature))
    if not 0 <= temperature <= 2:
        raise RequestError(f"temperature = {temperature}; it is 0 (greedy) to 2", "temperature")
    top_p = _typed(body, "top_p", (int, float), None)
    seed = _typed(body, "seed", int, random.SystemRandom().getrandbits(32))
    try:
        return GenerationOptions(temperature, top_p, max_new_tokens=tokens, seed=seed)
    except FlagError as error:  # top_p alone is left
        raise RequestError(f"top_p = {top_p}; it is 0 to 1", "top_p") from error


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops) or len(stops) > 4:
        raise RequestError("stop is a string, or a list of up to four", "stop")
    return tuple(stops)


def _messages(value: Any) -> tuple[Message, ...]:
    """Messages in an order that a conversation template can express."""
    if not isinstance(value, list) or not value:
        raise RequestError("messages is a list of at least one message", "messages")
    messages = [_message(item, f"messages[{index}]") for index, item in enumerate(value)]
    turns = messages[1:] if messages[0].role == "system" else messages
    wanted = ["user" if index % 2 == 0 else "assistant" for index in range(len(turns))]
    if [message.role for message in turns] != wanted or len(turns) % 2 == 0:
        roles = ", ".join(message.role for message in messages)
        raise RequestError(
            f"the roles are {roles}; after a system message at most, user and assistant alternate, and the user speaks "
            "first and last",
            "messages",
        )
    for index, message in enumerate(messages):
        if message.images and message.role != "user":
            raise RequestError(f"messages[{index}]: only the user shows images", "messages")
    return tuple(messages)


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping) or item.get("role") not in ("system", "developer", "user", "assistant"):
        raise RequestError(f"{where}: its role is system, user or assistant", "messages")
    role = "system" if item["role"] == "developer" else item["role"]
    content = item.get("content")
    if isinstance(content, str):
        return Message(role, content, ())
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where}: content is a text, or a list of parts", "messages")
    texts, images = [], []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            address = part.get("image_url")
            url = address.get("url") if isinstance(address, Mapping) else address
            if not isinstance(url, str):
                raise RequestError(f"{where}.content[{index}]: image_url has no url", "messages")
            images.append(url)
        else:
            raise RequestError(f"{where}.content[{index}]: a part is a text or an image_url", "messages")
    return Message(role, "\n".join(texts), tuple(images))
