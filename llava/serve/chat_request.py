"""Reading a request of OpenAI's chat API: checked by the models of `schema.py`, and by what a schema cannot say.

Every refusal names its parameter, and nothing that would change the answer is ignored.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from llava.constants import IMAGE_PLACEHOLDER
from llava.conversation import Conversation
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.prompts import add_image_markers, new_conversation
from llava.inference_options import option_names
from llava.serve.defaults import Defaults
from llava.serve.problems import RequestError, short
from llava.serve.schema import TAGS, ChatCompletionRequest, ChatMessage, TextPart


@dataclass(frozen=True)
class Message:
    """One message: `images` are addresses, in order, and `text` has `<image-placeholder>` where each of them goes."""

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
        wants_details: say what the extensions did, too.
        inference: options of installed packages for this request alone, see `llava.inference_options`.
    """

    model: str
    messages: tuple[Message, ...]
    options: GenerationOptions
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    wants_details: bool = False
    inference: tuple[tuple[str, str], ...] = ()

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
        raise RequestError("the body is not a JSON object")
    try:
        asked = ChatCompletionRequest.model_validate(body)
    except ValidationError as error:
        raise _refusal(error) from None
    messages = _messages(asked.messages, defaults)
    count = sum(len(message.images) for message in messages)
    if count > defaults.max_images:
        raise RequestError(f"{count} images; this server takes up to {defaults.max_images}", "messages")
    length = sum(len(message.text) for message in messages)
    if length > defaults.max_prompt_chars:
        raise RequestError(
            f"the messages have {length} characters; this server takes up to {defaults.max_prompt_chars}", "messages"
        )
    return ChatRequest(
        model=asked.model,
        messages=messages,
        options=_options(asked, defaults),
        stops=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        wants_details=bool(asked.details),
        inference=_inference(asked),
    )


def _inference(asked: ChatCompletionRequest) -> tuple[tuple[str, str], ...]:
    """Options of installed packages as a command line has them."""
    given = {"reduce": asked.reduce, "keep": asked.keep, "positions": asked.positions}
    found = tuple((name, str(value)) for name, value in given.items() if value is not None)
    if unknown := [name for name, _ in found if name not in option_names()]:
        raise RequestError(f"the parameter '{unknown[0]}' is of a package that is not installed here", unknown[0])
    return found


def _refusal(error: ValidationError) -> RequestError:
    """The first thing that a schema finds wrong, in words."""
    first = error.errors(include_url=False)[0]
    path, context, value = _path(first["loc"]), first.get("ctx", {}), first["input"]
    match first["type"]:
        case "extra_forbidden":
            return RequestError(f"the parameter '{path}' is not known here", path)
        case "missing":
            return RequestError(f"{path} is missing", path)
        case "too_long" | "too_short":
            least, most = context.get("min_length"), context.get("max_length")
            bounds = f"at least {least}" if most is None else f"up to {most}"
            return RequestError(f"{path} has {len(value)} entries; it takes {bounds}", path)
        case "string_too_long":
            return RequestError(f"{path} has {len(value)} characters; it takes up to {context['max_length']}", path)
        case "model_type":
            return RequestError(f"{path} = {short(value)}: must be an object", path)
        case "string_type" | "int_type" | "float_type" | "bool_type" | "list_type" | "dict_type":
            return RequestError(f"{path} = {short(value)} has the wrong type: {_must(first['msg'])}", path)
        case _:
            return RequestError(f"{path} = {short(value)}: {_must(first['msg'])}", path)


def _must(message: str) -> str:
    return message.replace("Input should be", "must be").replace("String should have", "must have")


def _path(place: tuple[int | str, ...]) -> str:
    """Where something is in a request: `messages[0].content[1].text`."""
    path = ""
    for index, step in enumerate(place):
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in TAGS or index == 0:
            path += f".{step}" if path else step
    return path[:200]


def conversation_of(request: ChatRequest, conv_mode: str, tokenizer: Any, mm_use_im_start_end: bool) -> Conversation:
    """The conversation with the answer still open.

    Images and texts of a message keep their order, each on a line of its own, unless a text says by
    `<image-placeholder>` where the images go.

    Raises:
        BadSampleError: markers in a text do not fit its images.
        RequestError: the template has no system text.
    """
    conversation = new_conversation(conv_mode, tokenizer)
    for number, message in enumerate(request.messages):
        if message.role == "system":
            conversation = conversation.with_system(message.text)
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


def _options(asked: ChatCompletionRequest, defaults: Defaults) -> GenerationOptions:
    if asked.max_completion_tokens is not None and asked.max_tokens is not None:
        raise RequestError("give max_completion_tokens or max_tokens, not both", "max_tokens")
    name = "max_completion_tokens" if asked.max_completion_tokens is not None else "max_tokens"
    tokens = asked.max_completion_tokens or asked.max_tokens or defaults.max_new_tokens
    if tokens > defaults.token_limit:
        raise RequestError(f"{name} = {tokens}; this server takes 1 to {defaults.token_limit}", name)
    temperature = defaults.temperature if asked.temperature is None else asked.temperature
    seed = random.SystemRandom().getrandbits(32) if asked.seed is None else asked.seed
    return GenerationOptions(temperature, asked.top_p, max_new_tokens=tokens, seed=seed)


def _messages(asked: list[ChatMessage], defaults: Defaults) -> tuple[Message, ...]:
    """Messages in an order that a conversation template can express."""
    messages = [_message(message, defaults.images_first) for message in asked]
    turns = messages[1:] if messages[0].role == "system" else messages
    wanted = ["user" if index % 2 == 0 else "assistant" for index in range(len(turns))]
    if [message.role for message in turns] != wanted or len(turns) % 2 == 0:
        roles = ", ".join(message.role for message in messages[:8]) + ", ..." * (len(messages) > 8)
        raise RequestError(
            f"the roles are {roles}; after a system message at most, user and assistant alternate, and the user speaks "
            "first and last",
            "messages",
        )
    for index, message in enumerate(messages):
        if message.images and message.role != "user":
            raise RequestError(f"messages[{index}]: only the user shows images", f"messages[{index}].content")
    return tuple(messages)


def _message(asked: ChatMessage, images_first: bool) -> Message:
    role = "system" if asked.role == "developer" else asked.role
    if isinstance(asked.content, str):
        return Message(role, asked.content, ())
    parts = list(asked.content)
    images = [part.image_url for part in parts if not isinstance(part, TextPart)]
    urls = tuple(image if isinstance(image, str) else image.url for image in images)
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if any(IMAGE_PLACEHOLDER in text for text in texts):
        return Message(role, "\n".join(texts), urls)
    if images_first:
        return Message(role, "\n".join([IMAGE_PLACEHOLDER] * len(urls) + texts), urls)
    lines = [part.text if isinstance(part, TextPart) else IMAGE_PLACEHOLDER for part in parts]
    return Message(role, "\n".join(lines), urls)
