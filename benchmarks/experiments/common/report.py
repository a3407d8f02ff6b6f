"""What every README of an experiment is filled with: cells of tables, blocks of commands, and the places for them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from llava.errors import LlavaError
from llava.runtime.output import replace_text


class DocumentError(LlavaError):
    """The document lacks the lines between which a table goes."""


def mean_and_range(values: Sequence[float]) -> str:
    """Mean, and lowest and highest value in brackets."""
    return f"{mean(values):.1f} ({min(values):.1f} - {max(values):.1f})"


def command_block(commands: Iterable[Sequence[str]]) -> str:
    """The commands as a fenced block, one option on a line."""
    blocks = []
    for words in commands:
        lines = ["python"]
        for word in words:
            if word.startswith("--"):
                lines.append(f"    {word}")
            else:
                lines[-1] += f" {shlex.quote(word)}"
        blocks.append(" \\\n".join(lines))
    return "```bash\n" + "\n\n".join(blocks) + "\n```"


def fill(text: str, name: str, content: str) -> str:
    """Replace what is between the lines `<!-- NAME begin -->` and `<!-- NAME end -->`.

    Raises:
        DocumentError: the lines are missing or in the wrong order.
    """
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise DocumentError(f"the document has no lines '{begin}' and '{end}' in this order")
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


def fill_document(document: Path, contents: Mapping[str, str]) -> None:
    """Fill every marked place of `document`, all of them or none.

    Args:
        document: the README of an experiment.
        contents: Markdown by the name of its place, see `fill`.

    Raises:
        DocumentError: a place is missing; nothing was written.
    """
    text = document.read_text(encoding="utf-8")
    for name, content in contents.items():
        text = fill(text, name, content)
    replace_text(document, text, check=False)
