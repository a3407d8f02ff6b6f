"""A client of the load test: asks, goes away, sends what must be refused, and compares everything that comes back."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import Sequence

import httpx

from tests.llava.serve.load_questions import Question
from tests.llava.serve.load_report import KINDS, Report

MODEL = "tiny-llava-v1.5"
PATH = "/v1/chat/completions"
HEADERS = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "Hello"}]
REFUSED: tuple[tuple[bytes, int], ...] = (
    (b"{", 400),
    (b"[]", 400),
    (json.dumps({"model": "another", "messages": HELLO}).encode(), 404),
    (json.dumps({"model": MODEL, "messages": HELLO, "n": 2}).encode(), 400),
    (json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 10**6}).encode(), 400),
    (json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "word " * 4000}]}).encode(), 400),
)
"""Bodies that are refused while others are answered, with the status."""


class Client:
    """One client: asks its own questions again and again, in an order drawn from its number.

    Args:
        number: of the client.
        questions: its own.
        address: of the server.
        report: filled in.
    """

    def __init__(self, number: int, questions: Sequence[Question], address: str, report: Report) -> None:
        self.number, self.questions, self.report = number, questions, report
        self.draw = random.Random(number)
        self.host, self.port = httpx.URL(address).host, httpx.URL(address).port
        # Connections are used again, as by OpenAI's client. Loading certificates for each client would take seconds.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.http = httpx.AsyncClient(base_url=address, timeout=60, verify=context, headers=HEADERS)

    async def run(self, until: float) -> None:
        """Ask until a time of `time.monotonic`."""
        kind, finished = list(KINDS)[self.number % len(KINDS)], False
        async with self.http:
            while time.monotonic() < until:
                if finished:
                    kind = self.draw.choices(list(KINDS), list(KINDS.values()))[0]
                begun = time.monotonic()
                try:
                    finished = await getattr(self, f"_{kind.replace(' ', '_')}")(self.draw.choice(self.questions))
                except (httpx.HTTPError, ValueError, LookupError) as error:  # no answer, or one of another form
                    self.report.wrong.append(f"{kind}: {type(error).__name__}: {error}")
                    continue
                if finished:
                    self.report.done[kind] += 1
                    self.report.slowest = max(self.report.slowest, time.monotonic() - begun)
                else:  # as a client that tries again
                    self.report.busy += 1
                    await asyncio.sleep(self.draw.uniform(0.02, 0.1))

    async def _whole(self, question: Question) -> bool:
        reply = await self.http.post(PATH, content=question.content)
        if self._is_busy(reply):
            return False
        if reply.status_code != 200:
            self.report.wrong.append(f"whole: status {reply.status_code}: {reply.text[:200]}")
            return True
        found = reply.json()
        choice = found["choices"][0]
        self._compare(question, choice["message"]["content"], choice["finish_reason"], found["usage"])
        return True

    async def _stream(self, question: Question) -> bool:
        async with self.http.stream("POST", PATH, content=question.streamed) as reply:
            if reply.status_code != 200:
                await reply.aread()
                if self._is_busy(reply):
                    return False
                self.report.wrong.append(f"stream: status {reply.status_code}: {reply.text[:200]}")
                return True
            lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line]
        if lines[-1] != "[DONE]":
            self.report.wrong.append(f"stream: it ends with {lines[-1][:200]}")
            return True
        events = [json.loads(line) for line in lines[:-1]]
        choices = [event["choices"][0] for event in events if event["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        self._compare(question, text, choices[-1]["finish_reason"], events[-1]["usage"])
        return True

    async def _refused(self, question: Question) -> bool:
        content, status = self.draw.choice(REFUSED)
        reply = await self.http.post(PATH, content=content)
        if self._is_busy(reply):
            return False
        if reply.status_code != status or not _has_form(reply):
            self.report.wrong.append(f"refused: {content[:60]!r} gave {reply.status_code}: {reply.text[:200]}")
        return True

    async def _leaves_a_stream(self, question: Question) -> bool:
        async with self.http.stream("POST", PATH, content=question.streamed) as reply:
            if reply.status_code != 200:
                await reply.aread()
                return not self._is_busy(reply)
            async for _ in reply.aiter_raw():
                return True  # closes the connection after the first piece
        return True

    async def _leaves_an_answer(self, question: Question) -> bool:
        return await self._send_and_go(question.content, len(question.content))

    async def _leaves_a_request(self, question: Question) -> bool:
        return await self._send_and_go(question.content, len(question.content) // 2)

    async def _send_and_go(self, content: bytes, sent: int) -> bool:
        """Send the first bytes of a request over a connection of its own, wait a little, close it."""
        _, writer = await asyncio.open_connection(self.host, self.port)
        head = f"POST {PATH} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[:sent])
        await writer.drain()
        await asyncio.sleep(self.draw.uniform(0, 0.1))
        writer.close()
        return True

    def _is_busy(self, reply: httpx.Response) -> bool:
        """True if the server says in OpenAI's form that it has too much to do."""
        if reply.status_code != 429:
            return False
        if not _has_form(reply) or "try again" not in reply.json()["error"]["message"]:
            self.report.wrong.append(f"429 without words: {reply.text[:200]}")
        return True

    def _compare(self, question: Question, text: str, reason: str, tokens: dict[str, int]) -> None:
        found, wanted = (text, reason, tokens), (question.answer, question.reason, question.usage)
        if found != wanted:
            self.report.wrong.append(f"another's answer: {found} instead of {wanted}")


def _has_form(reply: httpx.Response) -> bool:
    """True for an error as OpenAI's clients read it."""
    try:
        error = reply.json()["error"]
        return error.keys() >= {"message", "type", "param", "code"} and bool(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
