"""What no reply of the server may be, whatever was asked: held against the server's own OpenAPI document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs

from tests.llava.serve.asgi_calls import Call, Reply

MOST_SECONDS = 6.0
"""Of computing time for one request to a tiny model; the requests that stalled the server took 15 and more."""

PRIVATE = ("Traceback", "site-packages", str(Path(__file__).parents[3]), " object at 0x", "/tmp/")  # noqa: S108 - sought
"""What no message to a client may have: places of this machine and of its memory."""

PARAMETER = re.compile(r"\\{\w+\\}")


class Checks:
    """What a document declares.

    Args:
        document: OpenAPI 3.1.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        # "{model}" stands for the rest of the path, as in OpenAI's own server.
        self._paths = [(re.compile(PARAMETER.sub(".*", re.escape(path)), re.S), path) for path in document["paths"]]
        self._validators: dict[str, Any] = {}

    def faults(self, call: Call, reply: Reply) -> list[str]:
        """What is wrong with a reply, in words; empty if it is as declared."""
        if reply.error is not None:
            return [f"{type(reply.error).__name__} left the application: {reply.error}"]
        found = [f"status {reply.status}"] if reply.status >= 500 or reply.status < 200 else []
        if reply.cost > MOST_SECONDS:
            found.append(f"it took {reply.cost:.1f} s of computing time")
        responses = self._responses(call)
        if responses is None:
            found += (
                [] if reply.status in (403, 404, 405) else [f"status {reply.status} on a path that is not declared"]
            )
        elif str(reply.status) not in responses:
            found.append(f"status {reply.status} is not declared")
        else:
            found += self._content_faults(responses[str(reply.status)].get("content", {}), call, reply)
        if reply.status >= 400 and call.method != "HEAD":
            found += self._error_faults(reply)
        return found

    def _responses(self, call: Call) -> dict[str, Any] | None:
        """The declared responses of a request, by status; None: its path or method is not declared."""
        path = call.scope["path"]
        if path == "/openapi.json" and call.method in ("GET", "HEAD"):
            return {"200": {"content": {"application/json": {"schema": {"type": "object"}}}}, "403": {}}
        place = next((place for pattern, place in self._paths if pattern.fullmatch(path)), None)
        method = "GET" if call.method == "HEAD" else call.method  # HEAD is answered where GET is
        declared = {name.upper(): operation for name, operation in self.document["paths"].get(place, {}).items()}
        operation = declared.get(method)
        return None if operation is None else operation["responses"]

    def _content_faults(self, content: dict[str, Any], call: Call, reply: Reply) -> list[str]:
        kind = reply.headers.get("content-type", "").partition(";")[0]
        if kind not in content:
            return [f"content type {kind!r} is not declared; {sorted(content)} are"] if content else []
        if call.method == "HEAD":
            return []
        if kind == "text/event-stream":
            return self._event_faults(reply)
        return self._value_faults(bytes(reply.body), content[kind]["schema"])

    def _event_faults(self, reply: Reply) -> list[str]:
        *events, last = reply.body.decode().removesuffix("\n\n").split("\n\n")
        chunk = {"$ref": "#/components/schemas/ChatCompletionChunk"}
        found = [] if last == "data: [DONE]" else [f"the stream ends with {last[:100]}"]
        for event in events:
            found += self._value_faults(event.removeprefix("data: ").encode(), chunk)
        return found

    def _error_faults(self, reply: Reply) -> list[str]:
        problem = {"$ref": "#/components/schemas/Problem"}
        if found := self._value_faults(bytes(reply.body), problem):
            return [f"not OpenAI's form of an error: {fault}" for fault in found]
        message = json.loads(reply.body)["error"]["message"]
        found = [f"the message has {word!r}" for word in PRIVATE if word in message]
        return found + ([] if 0 < len(message) < 2000 else [f"the message has {len(message)} characters"])

    def _value_faults(self, content: bytes, schema: dict[str, Any]) -> list[str]:
        try:
            value = json.loads(content)
        except ValueError as error:
            return [f"it is not JSON: {error}: {content[:100]!r}"]
        key = json.dumps(schema)
        if key not in self._validators:
            whole = {**schema, "components": self.document["components"]}
            self._validators[key] = jsonschema_rs.validator_for(whole)
        return [
            f"not of the declared form: {error.message[:200]}" for error in self._validators[key].iter_errors(value)
        ]
