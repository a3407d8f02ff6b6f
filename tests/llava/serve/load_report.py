"""What happened under load, and what of it may not be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.llava.serve.load_process import NOTHING, Usage

KINDS = {"whole": 6, "stream": 6, "refused": 3, "leaves a stream": 3, "leaves an answer": 1, "leaves a request": 1}
"""What a client does next, and how often."""


@dataclass
class Report:
    """What happened.

    Attributes:
        clients: number of clients.
        seconds: length of the load.
        done: how often each kind of request came to its end.
        busy: how often a client was told to come back (429).
        wrong: what no client may see, in words.
        slowest: seconds of the slowest answer, waiting at the client's side included.
        waiting: the most requests that waited in the server at a time.
        answering: the largest batch.
        begin: the server's memory, threads and files after the warm-up.
        peak: the most of each after that.
        end: the same when all clients have gone.
    """

    clients: int
    seconds: float
    done: Counter[str] = field(default_factory=Counter)
    busy: int = 0
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    waiting: int = 0
    answering: int = 0
    begin: Usage = NOTHING
    peak: Usage = NOTHING
    end: Usage = NOTHING

    @property
    def growth(self) -> float:
        """Megabytes of the server's memory above those after the warm-up."""
        return self.peak.megabytes - self.begin.megabytes

    def text(self) -> str:
        """The counts, a line each."""
        counts = "".join(f"  {kind}: {self.done[kind]}\n" for kind in KINDS)
        return (
            f"{self.clients} clients in {self.seconds:g} s\n{counts}"
            f"  told to come back: {self.busy}\n"
            f"at most {self.waiting} waited and {self.answering} were answered together; the slowest took "
            f"{self.slowest:.1f} s\n"
            f"memory: {self.begin.megabytes:.1f} MB after the warm-up, at most {self.peak.megabytes:.1f} MB\n"
            f"threads: at most {self.peak.threads}; files and connections: at most {self.peak.files}, "
            f"{self.end.files} at the end"
        )


MEMORY = 32.0
"""Megabytes that the server may grow after its warm-up. In two minutes it grew by 6 while about 390 MB of requests
came, so one that keeps a tenth of them is found."""

SPARE_FILES = 16


def problems(report: Report, waiting: int, batch: int, megabytes: float = MEMORY) -> list[str]:
    """What may not be, in words; empty if all is well.

    Args:
        report: what happened.
        waiting: requests that may wait in the server.
        batch: requests that it may answer together.
        megabytes: by which its memory may grow after the warm-up.
    """
    found = [f"{count} times: {what}" for what, count in Counter(report.wrong).most_common(20)]
    found += [f"it never happened: {kind}" for kind in KINDS if not report.done[kind]]
    if report.growth > megabytes:
        found.append(f"memory grew by {report.growth:.1f} MB after the warm-up; the limit is {megabytes:g}")
    if report.waiting > waiting or report.answering > batch:
        found.append(
            f"{report.waiting} requests waited and {report.answering} were answered; the limits are {waiting}, {batch}"
        )
    if report.clients > waiting + batch and not report.busy:
        found.append(f"{report.clients} clients, and none was told to come back")
    if report.end.files > report.begin.files + SPARE_FILES:
        found.append(f"{report.end.files} files and connections are open when all clients have gone")
    return found
