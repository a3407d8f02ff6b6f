"""Connections: who is slow is closed, and what is not HTTP is answered as every other error.

uvicorn has a time limit for idle connections alone. A client that sends a header a minute, or that never reads its
answer, would keep its connection for ever.
"""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava.serve.problems import problem_of

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI


@dataclass(frozen=True)
class Patience:
    """Seconds that a connection may take.

    Attributes:
        head: until the head of a request has arrived, or the rest of one that was refused.
        reading: until a client goes on reading its answer.
    """

    head: float = 20.0
    reading: float = 60.0


def make_server(app: FastAPI, patience: Patience | None = None, log_level: str = "info") -> uvicorn.Server:
    """A server that is not started yet; `run(sockets=[...])` serves until it is interrupted.

    Args:
        app: what answers.
        patience: with slow clients.
        log_level: of uvicorn.
    """
    import uvicorn

    # One protocol whatever is installed, since its limits are ours; there is nothing here for WebSockets.
    config = uvicorn.Config(app, log_level=log_level, http=_protocol(patience or Patience()), ws="none")
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket to which clients can connect; they wait until a server accepts them.

    Raises:
        OSError: it cannot be.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _protocol(patience: Patience) -> type[asyncio.Protocol]:
    """The protocol of uvicorn with time limits."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class PatientProtocol(H11Protocol):
        """One connection."""

        _waiting: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        # The head: from the first moment of a connection, and from the first byte of each further request.
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # A pause from the first byte that is not taken: usually 64 KB may stay behind, on which nobody waits.
            transport.set_write_buffer_limits(high=0)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            self.resume_writing()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # Either a head is on its way, or the rest of a body whose request has been answered already.
            begun = self.conn.their_state is h11.IDLE
            refused = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
            if (begun or refused) and not self.transport.is_closing():
                self._await_head()
            else:
                self._stop_waiting()

        # The answer: the transport asks for a pause when it could not send all, which is when nobody reads.
        def pause_writing(self) -> None:
            super().pause_writing()
            if self._unread is None:
                self._unread = self.loop.call_later(patience.reading, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        # What uvicorn calls for bytes that are not HTTP.
        def send_400_response(self, msg: str) -> None:
            self._answer(400, "this is not HTTP/1.1, or its head is too large")

        # One timer for both waits; bytes that trickle do not start it again.
        def _await_head(self) -> None:
            if self._waiting is None:
                self._waiting = self.loop.call_later(patience.head, self._too_slow)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _too_slow(self) -> None:
            # Nothing can be said after an answer has been given.
            if self.conn.our_state is h11.IDLE:
                self._answer(408, f"the request took more than {patience.head:g} s to arrive")
            else:
                self.transport.close()

        def _answer(self, status: int, message: str) -> None:
            """The last answer of this connection."""
            if self.transport.is_closing():
                return
            content = json.dumps(problem_of(status, message)).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(content)))]
            head = h11.Response(status_code=status, headers=[*headers, ("connection", "close")])
            for event in (head, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            self.transport.close()

    return PatientProtocol
