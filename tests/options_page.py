"""Writes `docs/options.md` from the tables of the training programs: `python -m tests.options_page`."""

from __future__ import annotations

from hydralora.text.option_table import TEXT_OPTIONS
from llava.runtime.trainer_options.document import document
from llava.runtime.trainer_options.row import Table
from llava.train.option_table import LLAVA_OPTIONS
from mma.lavin.option_table import LAVIN_OPTIONS
from tests.command_lines import ROOT

PAGE = ROOT / "docs" / "options.md"
PROGRAMS: dict[str, Table] = {
    "python -m llava.train.train": LLAVA_OPTIONS,
    "python -m hydralora.finetune": TEXT_OPTIONS,
    "python -m mma.train": LAVIN_OPTIONS,
}


def page() -> str:
    """What the page has to say."""
    return document(PROGRAMS)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
