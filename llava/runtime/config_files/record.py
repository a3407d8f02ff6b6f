"""The options of a former run, out of its `run.json`: those that were written down then.

What belongs to the former run alone is not taken over: where it wrote and logged, what it resumed from, where it was
published.
Records of earlier versions do not say what was written down; of these, every recorded option is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llava.runtime.unchanged import SECTIONS, check_sections
from llava.runtime.weights.run_file import GIVEN, check_resumes, latest

OF_THAT_RUN = frozenset(
    [
        *("output_dir", "overwrite_output_dir", "log_dir", "logging_dir", "resume_from_checkpoint", "resume_changed"),
        *("resume", "local_rank", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"),
        *("hub_always_push", "hub_revision", "hub_base_model", "hub_license"),
        *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    ]
)
"""Options that are not taken over; pass them again where they are wanted."""


def is_record(content: Mapping[str, Any]) -> bool:
    """Whether the content of a JSON file is the record of a run, and not a table of options."""
    return isinstance(content.get("versions"), dict) and isinstance(content.get("arguments", content), dict)


def recorded_options(path: Path, content: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The options of a former run by name; those that were resumed with changes as they were last.

    Args:
        path: of the record.
        content: of the record.
        known: names of the program's options; of an earlier version's record others are left out.

    Raises:
        CheckpointError: the record is damaged.
    """
    check_resumes(content, path)
    last = latest(content)
    check_sections(last, path)
    sections = last.get("arguments", last)
    values: dict[str, Any] = {}
    for section in (*SECTIONS[1:], SECTIONS[0]):  # what a program around llava's was told comes last, and holds
        values |= sections.get(section) or {}
    for options in (sections.get("options") or {}).values():
        values = (options or {}) | values
    given = last.get(GIVEN)
    names = set(given) if isinstance(given, list) else {name for name in values if name in known}
    return {name: values[name] for name in sorted(names - OF_THAT_RUN) if name in values}
