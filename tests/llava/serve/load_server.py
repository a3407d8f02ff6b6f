"""`python -m llava.serve.api` with faults that can be switched on: controls of the load test.

`POST /fault/NAME` switches one on, `POST /fault/none` off. A fault sits in front of the application and depends on none
of its parts.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from llava.runtime.program import run_program
from llava.serve import api, app

FAULTS = ("none", "keeps-requests", "answers-another", "formless-errors")
COPIES = 40
"""Of what a request brings, kept by a fault: a load of seconds has to show what one of hours would."""

Message = MutableMapping[str, Any]


class Faulty:
    """An application with a fault.

    Args:
        app: the server's.
    """

    def __init__(self, app: Any) -> None:
        self.app, self.fault = app, "none"
        self.kept: list[bytes] = []

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] == "http" and scope["path"].startswith("/fault/"):
            self.fault = scope["path"].removeprefix("/fault/")
            assert self.fault in FAULTS, self.fault
            self.kept.clear()
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def received() -> Message:
            message: Message = await receive()
            return self._spoiled(message) if message["type"] == "http.request" else message

        async def sent(message: Message) -> None:
            if self.fault == "formless-errors" and message["type"] == "http.response.body":
                message = {**message, "body": message["body"].replace(b'{"error":', b'{"wrong":')}
            await send(message)

        await self.app(scope, received, sent)

    def _spoiled(self, message: Message) -> Message:
        body = bytes(message["body"])
        if self.fault == "keeps-requests":
            self.kept.append(body * COPIES)
        whole = body.startswith(b'{"model"') and not message.get("more_body")
        if self.fault == "answers-another" and whole and b'"stream"' not in body:
            self.kept.append(body)
            return {**message, "body": self.kept.pop(0) if len(self.kept) > 1 else body}
        return message


def main() -> None:
    """The server with faults; its options are those of the real one."""
    create_app = app.create_app
    app.create_app = lambda *given: Faulty(create_app(*given))  # type: ignore[assignment, return-value]
    api.main()


if __name__ == "__main__":
    run_program(main)
