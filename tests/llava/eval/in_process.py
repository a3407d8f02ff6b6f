"""Shell scripts run for real, but their programs in this process: the model is loaded once instead of in every program.

`PYTHON` is set to a client of a few milliseconds that sends its arguments over a socket and ends with the status that
comes back. What bash does (chunks, merging, failing) is exactly what a user's machine does.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.command_lines import ROOT, our_call

CLIENT = """#!{python} -SEI
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    server.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
    sys.exit(int(server.makefile().read()))
"""


@dataclass
class Programs:
    """The stand-in for `python` and what was called through it.

    Attributes:
        python: what to set `PYTHON` to.
        calls: arguments of every call, in order.
    """

    python: Path
    calls: list[list[str]] = field(default_factory=list)

    def run(self, argv: list[str]) -> int:
        """Carry out one call; the exit status."""
        self.calls.append(argv)
        call = our_call(["python", *argv])
        assert call is not None, argv
        try:
            module = importlib.import_module(call.module)
            if hasattr(module, "__path__"):
                module = importlib.import_module(f"{call.module}.__main__")
            module.main(list(call.arguments))
        except (Exception, SystemExit):
            traceback.print_exc()
            return 1
        return 0

    def script(self, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script of the repository."""
        return subprocess.run(
            ["bash", str(ROOT / name), *arguments],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "PYTHON": str(self.python), "CUDA_VISIBLE_DEVICES": "0,1"} | environment,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )


@contextlib.contextmanager
def programs(folder: Path) -> Iterator[Programs]:
    """Serve calls until the block ends, one after the other.

    Args:
        folder: for the socket and the client; its path must be short.
    """
    path = folder / "s"
    result = Programs(folder / "python")
    result.python.write_text(CLIENT.format(python=sys.executable, path=str(path)), encoding="utf-8")
    result.python.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(16)
        thread = threading.Thread(target=_serve, args=(server, result), daemon=True)
        thread.start()
        yield result
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(path))
        thread.join()


def _serve(server: socket.socket, result: Programs) -> None:
    while True:
        connection, _ = server.accept()
        with connection, connection.makefile("rw") as stream:
            line = stream.readline()
            if not line:
                return
            stream.write(str(result.run(json.loads(line))))
