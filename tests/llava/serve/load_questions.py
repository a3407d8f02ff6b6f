"""Questions of many clients whose right answers are known and differ: no client can get another's answer unnoticed.

Each question is asked once, alone, before the load begins. Half have an image of their own; half are sampled with a
seed of their own, which gives the same answer whatever else is in the batch.
"""

from __future__ import annotations

import base64
import io
import json
import random
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

TOKENS = 12
IMAGE_SIDE = 256
"""Pixels of noise, so that a request with an image has about 260 KB: a server that keeps requests grows fast."""


@dataclass(frozen=True)
class Question:
    """A request and what its answer has to be.

    Attributes:
        body: of `POST /v1/chat/completions`, without `stream`.
        answer: the text that the server gave when nobody else asked.
        reason: its `finish_reason`.
        usage: its numbers of tokens.
    """

    body: dict[str, Any]
    answer: str
    reason: str
    usage: dict[str, int]

    @property
    def content(self) -> bytes:
        """The body as it is sent, for an answer at once."""
        return json.dumps(self.body).encode()

    @property
    def streamed(self) -> bytes:
        """The body as it is sent, for a stream that ends with the numbers of tokens."""
        return json.dumps(self.body | {"stream": True, "stream_options": {"include_usage": True}}).encode()


def noise_url(seed: int) -> str:
    """An image that no other seed gives, as a `data:` address."""
    draw, file = random.Random(seed), io.BytesIO()
    size = (IMAGE_SIDE, IMAGE_SIDE)
    Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def question_body(model: str, number: int, attempt: int) -> dict[str, Any]:
    """Request `number`: with an image if it is odd, sampled if its half is odd."""
    content: Any = f"Client {number} asks {attempt}: what is {'really ' * (number % 4)}shown to client {number}?"
    if number % 2:
        image = {"type": "image_url", "image_url": {"url": noise_url(number)}}
        content = [{"type": "text", "text": content}, image]
    sampling = {"temperature": 1.0, "seed": number} if number // 2 % 2 else {"temperature": 0.0}
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        **sampling,
    }


def ask_alone(client: httpx.Client, model: str, count: int) -> list[Question]:
    """`count` questions with answers that all differ.

    Args:
        client: of a server that nobody else asks.
        model: its name.
        count: number of questions.
    """
    found: dict[str, Question] = {}
    for number in range(count):
        for attempt in range(20):
            body = question_body(model, number, attempt)
            reply = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            choice = reply["choices"][0]
            answer = choice["message"]["content"]
            if answer and answer not in found:
                found[answer] = Question(body, answer, choice["finish_reason"], reply["usage"])
                break
        else:
            raise AssertionError(f"question {number} has the answer of another, whatever its words: {answer!r}")
    return list(found.values())
