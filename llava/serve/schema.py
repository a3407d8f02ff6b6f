"""Requests and responses of OpenAI's chat API as pydantic models: what is checked, and what the OpenAPI document says.

A parameter that would change the answer and is not supported has one value here, the one that asks for nothing, so it
is refused by name. Types are strict: a number in quotes is not a number, and a bool is not an integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag
from pydantic_core import PydanticCustomError, core_schema

from llava.details import KeptPatches, KeptWords, Shares

MAX_STOPS = 4
MAX_STOP_CHARS = 1000
"""Characters of one stop string."""

MAX_PLAN_CHARS = 500
"""Characters of a plan of rules."""

MAX_MESSAGES = 2048
"""Messages of a request, and parts of a message."""

TEXT, LIST, OBJECT, IMAGE, COUNT, SHARE = "<text>", "<list>", "<object>", "<image>", "<count>", "<share>"
TAGS = frozenset({TEXT, LIST, OBJECT, IMAGE, COUNT, SHARE})
"""Which form of a field was found; pydantic puts it into an error's path, where clients do not expect it."""


@dataclass(frozen=True, eq=False)  # `Annotated` keeps one of two that are equal, and False equals 0
class Only:
    """A parameter that is not supported: only the values that ask for nothing are accepted."""

    values: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """A function that compares: `true` is not 1."""

        def check(value: Any) -> Any:
            for allowed in self.values:
                if isinstance(value, bool) == isinstance(allowed, bool) and value == allowed:
                    return value
            raise PydanticCustomError("not_supported", "is not supported here; leave it out")

        return core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The values."""
        return {"enum": list(self.values)}


def _form(value: Any) -> str | None:
    """Which of the forms of a field this is; None if it is none of them."""
    forms: dict[type, str] = {str: TEXT, list: LIST, dict: OBJECT}
    return forms.get(type(value))


def _budget(value: Any) -> str | None:
    """Which form a budget has; `true` is none."""
    forms: dict[type, str] = {int: COUNT, float: SHARE, str: TEXT}
    return forms.get(type(value))


def _part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return {"text": TEXT, "image_url": IMAGE}.get(kind) if isinstance(kind, str) else None


def _one_of(choose: Any, message: str) -> Discriminator:
    """Chooses one form, so that an error speaks of that form alone."""
    return Discriminator(choose, custom_error_type="wrong_type", custom_error_message=message)


class _Asked(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageAddress(_Asked):
    """Where an image is; `detail` is accepted and has no influence."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class TextPart(_Asked):
    """A text among the parts of a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Asked):
    """An image among the parts of a message."""

    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[str, Tag(TEXT)] | Annotated[ImageAddress, Tag(OBJECT)],
        _one_of(_form, "must have a url"),
    ]


Part = Annotated[
    Annotated[TextPart, Tag(TEXT)] | Annotated[ImagePart, Tag(IMAGE)],
    _one_of(_part, "a part is a text or an image_url"),
]


class ChatMessage(_Asked):
    """One message. What an answer of this server holds besides role and content may come back empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(TEXT)]
        | Annotated[list[Part], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag(LIST)],
        _one_of(_form, "must be a text or a list of parts"),
    ]
    name: str | None = None
    refusal: Annotated[Any, Only((None,))] = None
    annotations: Annotated[Any, Only((None, []))] = None
    audio: Annotated[Any, Only((None,))] = None
    function_call: Annotated[Any, Only((None,))] = None
    tool_calls: Annotated[Any, Only((None, []))] = None


class StreamOptions(_Asked):
    """What a stream says besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only((None, False))] = None


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class ChatCompletionRequest(_Asked):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[
            Annotated[StopString, Tag(TEXT)] | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag(LIST)],
            _one_of(_form, f"must be a string, or a list of up to {MAX_STOPS}"),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    details: bool | None = None
    """Of this server: say what the extensions did for the answer; see `Details`."""

    reduce: Annotated[str, Field(min_length=1, max_length=MAX_PLAN_CHARS)] | None = None
    """Of this server: drop image tokens by this plan of rules; without one, as the server was started."""

    keep: (
        Annotated[
            Annotated[int, Field(ge=1, le=10**6), Tag(COUNT)]
            | Annotated[float, Field(gt=0, lt=1), Tag(SHARE)]
            | Annotated[str, Field(min_length=1, max_length=MAX_PLAN_CHARS), Tag(TEXT)],
            _one_of(_budget, "must be a whole number of tokens, a share below 1, or a text as avg:128"),
        ]
        | None
    ) = None
    """Its budget: a whole number of tokens, a share below 1, or a text as `avg:128`."""

    positions: Literal["original", "renumber"] | None = None
    """Positions of the tokens that are left."""

    # Without influence on the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # Not supported: only what asks for nothing.
    n: Annotated[Any, Only((None, 1))] = None
    logprobs: Annotated[Any, Only((None, False))] = None
    top_logprobs: Annotated[Any, Only((None, 0))] = None
    frequency_penalty: Annotated[Any, Only((None, 0))] = None
    presence_penalty: Annotated[Any, Only((None, 0))] = None
    logit_bias: Annotated[Any, Only((None, {}))] = None
    response_format: Annotated[Any, Only((None, {"type": "text"}))] = None
    tools: Annotated[Any, Only((None, []))] = None
    tool_choice: Annotated[Any, Only((None, "none", "auto"))] = None
    parallel_tool_calls: Annotated[Any, Only((None, True, False))] = None
    modalities: Annotated[Any, Only((None, ["text"]))] = None


class _Answered(BaseModel):
    """A part of a response."""

    model_config = ConfigDict(extra="forbid")


class Usage(_Answered):
    """Numbers of tokens; an image counts as the positions it takes."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(_Answered):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class Choice(_Answered):
    """The only choice of a response."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: None = None


class Details(_Answered):
    """What the extensions did while the answer was given, for requests with `details`.

    Attributes:
        images: the images of the conversation as the tower sees them, since patches are counted on them; of a tiled
            image its overview. Empty where no extension speaks of patches.
        extensions: what each of them says, by its name; see `llava.details`.
    """

    images: list[str]
    extensions: dict[str, list[KeptPatches | KeptWords | Shares]]


class ChatCompletion(_Answered):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    usage: Usage
    details: Details | None = None


class Delta(_Answered):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Answered):
    """The only choice of a chunk."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class ChatCompletionChunk(_Answered):
    """One event of a streamed answer; the one with `usage` has no choice."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: Annotated[list[ChunkChoice], Field(max_length=1)]
    usage: Usage | None = None
    details: Details | None = None


class Model(_Answered):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llava-extensions"


class ModelList(_Answered):
    """All models of the server: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(_Answered):
    """How busy the server is."""

    status: Literal["ok", "stopped"]
    answering: int
    waiting: int


class ProblemDetail(_Answered):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class Problem(_Answered):
    """An error as OpenAI's clients read it."""

    error: ProblemDetail
