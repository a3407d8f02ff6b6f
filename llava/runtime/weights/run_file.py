"""The shape of `run.json`: how a run was started, and under `resumes` how it was continued with changed options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError

RESUMES = "resumes"
"""Key of the records that were appended, the oldest first; each has the keys of the first one and these two."""

RESUMED_FROM, CHANGED = "resumed_from", "changed"
"""The checkpoint, and the differences from the record before, one line each."""


GIVEN = "given"
"""Key of the names of the options that were written down; the others had their defaults, or followed from these."""


def latest(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the options that hold: those of the start, or of the latest changed resume.

    Args:
        record: content of `run.json`, also of one that an earlier version wrote.
    """
    resumes = record.get(RESUMES)
    last = resumes[-1] if isinstance(resumes, list) and resumes else record
    return {name: value for name, value in (last if isinstance(last, dict) else record).items() if name != RESUMES}


def check_resumes(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a record whose list of changed resumes is not one.

    Raises:
        CheckpointError: names the file.
    """
    resumes = record.get(RESUMES, [])
    if not isinstance(resumes, list) or not all(isinstance(each, dict) for each in resumes):
        raise CheckpointError(
            f"{path}: '{RESUMES}' should be a list of records; the record of this run is damaged. Get the file again, "
            "or choose another --output_dir"
        )
