"""The table of `benchmarks/peers.py`: for each comparison the goal, what was measured, and the floor.

A ratio is the peer's time over ours, the median of ratios within a round: above one, ours is faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import peer_answers, peer_server, peer_sparse, peer_training
from llava.errors import FlagError
from llava.runtime.output import replace_text

BEGIN, END = "<!-- benchmarks.peers: begin -->", "<!-- benchmarks.peers: end -->"
"""What the table of a page is between."""

GOALS = {
    "LoRA": 1.10,
    "LoRA, memory": 1.25,
    "HydraLoRA": 1.00,
    "HydraLoRA, memory": 1.25,
    "answers, batch 1": 1.00,
    "answers, batch": 1.10,
    "answers, harness": 1.00,
    "server, one client": 1.00,
    "server": 1.50,
    "prefill": 1.50,
    "decoding": 1.00,
}
"""By how much we mean to be ahead: the peer's time, or memory, over ours."""


@dataclass(frozen=True)
class Row:
    """A comparison.

    Attributes:
        work: what is done.
        peer: by whom else.
        goal: key of `GOALS`.
        ratio: the peer's over ours.
        spread: lowest and highest, if it is of times.
        floor: our time over the floor, if there is one.
    """

    work: str
    peer: str
    goal: str
    ratio: float
    spread: tuple[float, float] | None
    floor: float | None

    @property
    def reached(self) -> bool:
        """Whether the goal is reached."""
        return self.ratio >= GOALS[self.goal]


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """All comparisons of a record."""
    readers = {"train": _training, "eval": _answers, "serve": _server, "sparse": _sparse}
    parts = record["parts"]
    return [
        row
        for section, read in readers.items()
        for part in _ordered(parts.get(section, {}))
        for row in read(parts[section][part]["found"])
    ]


def _ordered(parts: Mapping[str, Any]) -> list[str]:
    """Names of parts by the number in them."""
    return sorted(parts, key=lambda name: [float(word) for word in name.split() if word.replace(".", "").isdigit()])


def _quotient(found: Mapping[str, float]) -> tuple[float, tuple[float, float]]:
    return found["median"], (found["min"], found["max"])


def _training(found: Mapping[str, Any]) -> Iterator[Row]:
    for method, ratios in found["peer_over_ours"].items():
        work = f"update, {method}, dropout {found['dropout']:g}"
        ours = found["seconds"][method]["median"] / found["floor"]["seconds"]
        peer = f"{peer_training.PEER} LoRA"
        yield Row(f"{work}: time", peer, method, *_quotient(ratios["time"]), ours)
        yield Row(f"{work}: memory beyond the weights", peer, f"{method}, memory", ratios["memory"], None, None)


def _answers(found: Mapping[str, Any]) -> Iterator[Row]:
    floor = found["floor"]["answers_per_second"] / found["answers_per_second"][peer_answers.OURS]["median"]
    for peer, ratio in found["peer_over_ours"].items():
        goal = "answers, batch 1" if found["batch"] == 1 else "answers, batch"
        goal = "answers, harness" if peer == peer_answers.LMMS else goal
        yield Row(f"answers, batch {found['batch']}", peer, goal, *_quotient(ratio), floor)


def _server(found: Mapping[str, Any]) -> Iterator[Row]:
    if "peer_over_ours" in found:
        goal = "server, one client" if found["clients"] == 1 else "server"
        clients = f"{found['clients']} client" + ("s" if found["clients"] > 1 else "")
        yield Row(f"server, {clients}", peer_server.PEER, goal, *_quotient(found["peer_over_ours"]), None)


def _sparse(found: Mapping[str, Any]) -> Iterator[Row]:
    for kind in ("prefill", "decoding"):
        entry = found[kind]
        ours = entry["seconds"][peer_sparse.OURS]["median"] / entry["floor"][peer_sparse.OURS]
        for peer, ratio in entry["peer_over_ours"].items():
            goal = kind if peer in (peer_sparse.DENSE, peer_sparse.STATIC) else "decoding"
            yield Row(f"sparse {kind}, batch {found['batch']}", peer, goal, *_quotient(ratio), ours)


def table(record: Mapping[str, Any]) -> str:
    """One line per comparison."""
    lines = ["| what | peer | goal | peer / ours | lowest, highest | ours / floor | goal reached |"]
    lines.append("| --- | --- | --: | --: | --: | --: | --- |")
    for row in rows_of(record):
        between = "-" if row.spread is None else f"{row.spread[0]:.2f}, {row.spread[1]:.2f}"
        floor = "-" if row.floor is None else f"{row.floor:.2f}"
        reached = "yes" if row.reached else "**no**"
        cells = [row.work, row.peer, f"{GOALS[row.goal]:.2f}", f"{row.ratio:.2f}", between, floor, reached]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def left_out(record: Mapping[str, Any]) -> list[str]:
    """Peers that could not be compared with, and why."""
    found = {
        f"- {peer}: {reason}."
        for parts in record["parts"].values()
        for part in parts.values()
        for peer, reason in part["found"].get("left_out", {}).items()
    }
    return sorted(found)


def origin(record: Mapping[str, Any]) -> str:
    """Model, date, versions, machine, load and commands."""
    shape = record["shape"]
    parts = [part for section in record["parts"].values() for part in section.values()]
    if not parts:
        return "Nothing has been measured."
    dates = sorted({part["date"][:10] for part in parts})
    versions = ", ".join(sorted({f"{name} {number}" for part in parts for name, number in part["versions"].items()}))
    loads = [part["machine"]["load_average"][0] for part in parts]
    commands = "\n".join(f"$ {command}" for command in dict.fromkeys(part["command"] for part in parts))
    return (
        f"Llama of {shape['layers']} x {shape['width']} and {shape['vocabulary']} words, {record['patches']} patches, "
        f"random weights in float32; {' and '.join(dates)}; {versions}; {parts[0]['machine']['cpu']}, one thread; "
        f"load average when a part began {min(loads):.1f} to {max(loads):.1f}. Times of servers are those of the wall, "
        f"all others computing time of the process.\n\n```console\n{commands}\n```"
    )


def document(record: Mapping[str, Any]) -> str:
    """The Markdown file of a record."""
    notes = left_out(record)
    ending = "\n\nNot compared:\n\n" + "\n".join(notes) if notes else ""
    return f"# Next to peers\n\n{origin(record)}\n\n{table(record)}{ending}\n"


def write_page(path: Path, record: Mapping[str, Any]) -> None:
    """Replace the table of a page.

    Raises:
        FlagError: the page has no place for it.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FlagError(f"{path}: it has no place for the table, which goes between '{BEGIN}' and '{END}'")
    replace_text(path, f"{before}{BEGIN}\n\n{origin(record)}\n\n{table(record)}\n\n{END}{after}")
