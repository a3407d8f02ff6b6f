"""Every file of upstream's LLaVA is here under its path, or `docs/differences.md` says what replaces it."""

from __future__ import annotations

import fnmatch
import re

import pytest

from tests.structure import ROOT

FILES = (ROOT / "tests" / "llava" / "upstream_files.txt").read_text(encoding="utf-8").split()
"""The paths of upstream at commit c121f04, as `git ls-tree -r --name-only` lists them."""

DIFFERENCES = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
SECTION = DIFFERENCES.partition("## Files of LLaVA that are not here\n")[2].partition("\n## ")[0]
FIELDS = ["Original", "Here", "Why", "To get the original behaviour"]


def entries(text: str) -> dict[str, list[tuple[str, str]]]:
    """The entries of a section: heading, and its fields with their texts."""
    parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)[1:]
    field = re.compile(r"^- \*\*(.+?):\*\* (.+)$", re.MULTILINE)
    return {heading: field.findall(body) for heading, body in zip(parts[::2], parts[1::2], strict=True)}


ENTRIES = entries(SECTION)


def patterns(field: str) -> list[str]:
    """Paths that the entries name in a field, with stars in place of names."""
    texts = [dict(fields)[field] for fields in ENTRIES.values()]
    return [name for text in texts for name in re.findall(r"`([\w./*-]+)`", text)]


def named(path: str, names: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, name) for name in names)


def absent() -> list[str]:
    """What is not here; `playground/data` may hold a user's own files, which git ignores."""
    return [path for path in FILES if path.startswith("playground/data/") or not (ROOT / path).is_file()]


def test_the_list_is_that_of_upstream() -> None:
    assert len(FILES) == len(set(FILES)) == 175
    assert {"llava/train/train.py", "llava/serve/controller.py", "scripts/v1_5/eval/gqa.sh", "cog.yaml"} <= set(FILES)


def test_every_file_is_here_or_has_an_entry() -> None:
    names = patterns("Original")
    assert not [path for path in absent() if not named(path, names)]
    assert len(FILES) - len(absent()) > 70, "most files are here"


def test_every_entry_is_about_files_that_are_not_here() -> None:
    """An entry goes when its file comes, but for a program or a script that differs, or says what replaces it."""
    here = {"llava/serve/controller.py", "llava/serve/model_worker.py", "llava/serve/gradio_web_server.py"}
    here |= {"scripts/sqa_eval_batch.sh", "scripts/sqa_eval_gather.sh"}
    gone = absent()
    for name in patterns("Original"):
        if "/" in name or name in FILES:
            assert any(fnmatch.fnmatchcase(path, name) for path in gone) or name in here, name
    assert not here & set(gone)


@pytest.mark.parametrize("heading", ENTRIES)
def test_the_form_of_an_entry(heading: str) -> None:
    assert [name for name, _ in ENTRIES[heading]] == FIELDS


@pytest.mark.parametrize("module", sorted(set(re.findall(r"\bpython -m ([\w.]+)", SECTION))))
def test_what_an_entry_names_instead_exists(module: str) -> None:
    path = ROOT.joinpath(*module.split("."))
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_a_file_without_an_entry_is_seen() -> None:
    names = patterns("Original")
    assert not named("llava/eval/new.py", names)
    assert not named("llava/train/train.py", names)
    assert named("docs/MODEL_ZOO.md", names)
