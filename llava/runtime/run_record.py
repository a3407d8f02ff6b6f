"""`run.json`: resolved options, seed, package versions and commit of a run, written once, before the first step.

Of an option that has no effect nothing is recorded. A resumed run leaves the file as it is; one that is resumed with
changed options appends a record of them (`llava.runtime.weights.run_file`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from llava.runtime.files import read_json
from llava.runtime.output import replace_text
from llava.runtime.places import RUN_FILE
from llava.runtime.program import package_versions
from llava.runtime.unchanged import (
    FINGERPRINTS,
    SECTIONS,
    WORLD,
    Shares,
    batch_shares,
    describe_shares,
    differences,
    find_record,
    fingerprints,
    flat,
    length_is_free,
    read_record,
    refuse_changes,
)
from llava.runtime.used_settings import unused, without
from llava.runtime.weights.run_file import CHANGED, GIVEN, RESUMED_FROM, RESUMES, latest

__all__ = ["RUN_FILE", "Resumption", "copy_run_record", "resumption", "run_record", "used_sections", "write_run_record"]


class Options(Protocol):
    """All options of one run of a training program."""

    training: Any
    given: frozenset[str]

    def to_dict(self) -> dict[str, Any]:
        """Resolved values as JSON types."""


def _commit() -> str | None:
    """Commit of the source tree this package is run from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def used_sections(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a record without the options that have no effect; a default that follows from another is filled.

    Args:
        arguments: options by name in each section, and whatever else the record has.
    """
    options = flat(arguments)
    left_out = unused(options)
    sections = {name: value for name, value in arguments.items() if name not in SECTIONS}
    for name in SECTIONS:
        if name in arguments:
            sections[name] = without(arguments[name] or {}, left_out)
    if "options" in sections:
        sections["options"] = {name: without(values, left_out) for name, values in sections["options"].items()}
    training = sections.get("training", {})
    if training.get("data_seed", 0) is None:
        training["data_seed"] = training.get("seed")
    return sections


def describe(record: Mapping[str, Any], training: Any) -> dict[str, Any]:
    """A record of options with everything else that `run.json` says.

    Args:
        record: the options, by section.
        training: transformers' `TrainingArguments` of the run.
    """
    return {
        **record,
        "seed": training.seed,
        WORLD: training.world_size,
        FINGERPRINTS: fingerprints(flat(record)),
        "versions": package_versions(),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def run_record(args: Options) -> dict[str, Any]:
    """What `run.json` says of a run."""
    return describe({"arguments": used_sections(args.to_dict()), GIVEN: sorted(args.given)}, args.training)


def write_run_record(args: Options, record: Mapping[str, Any] | None = None) -> Path:
    """Write `run.json` into the output folder of a new run.

    Args:
        args: options of the run.
        record: as `run_record` gives it, where that was done before.

    Returns:
        Path of the file. It is written whole or not at all.

    Raises:
        FlagError: the output folder cannot be written.
    """
    return _write(Path(args.training.output_dir), run_record(args) if record is None else record)


def _write(folder: Path, record: Mapping[str, Any]) -> Path:
    return replace_text(folder / RUN_FILE, json.dumps(record, indent=2, sort_keys=True, default=str) + "\n")


def copy_run_record(output_dir: Path, checkpoint: Path) -> None:
    """Put the record of a run into one of its checkpoints."""
    source = output_dir / RUN_FILE
    if source.is_file() and source.parent.resolve() != checkpoint.resolve():
        shutil.copyfile(source, checkpoint / RUN_FILE)


@dataclass(frozen=True)
class Resumption:
    """A run that continues from a checkpoint.

    Attributes:
        folder: the checkpoint.
        record: of the options of now.
        output: output folder of the run.
        changes: differences from the run's record that `--resume_changed True` accepted, one line each.
        accepts_changes: `--resume_changed True` was given.
        length_is_free: the schedule does not depend on the number of updates.
        notes: what the user should know before the first update.
    """

    folder: Path
    record: dict[str, Any]
    output: Path
    changes: list[str] = field(default_factory=list)
    accepts_changes: bool = False
    length_is_free: bool = False
    notes: list[str] = field(default_factory=list)

    def keep_record(self, further: Sequence[str] = ()) -> None:
        """Leave `run.json` as it is; append a record if options have changed since the latest one.

        Into an output folder without a record of this run that of the checkpoint is copied first.

        Args:
            further: accepted differences that no option shows.

        Raises:
            FlagError: the output folder cannot be written.
        """
        before = self._stored()
        stored = before if before is not None else self.record | {RESUMED_FROM: str(self.folder)}
        last = latest(stored)
        changes = differences(last, self.record)
        changes += [line for line in further if line not in last.get(CHANGED, [])]
        if changes:
            addition = {**self.record, RESUMED_FROM: str(self.folder), CHANGED: changes}
            stored = {**stored, RESUMES: [*stored.get(RESUMES, []), addition]}
        path = self.output / RUN_FILE
        if not path.is_file() or read_json(path) != stored:
            _write(self.output, stored)

    def _stored(self) -> dict[str, Any] | None:
        """The record to keep: that of the output folder, unless the checkpoint is of another run."""
        own, source = self.output / RUN_FILE, self.folder / RUN_FILE
        stored = read_json(own) if own.is_file() else None
        if stored is not None and self.folder.parent.resolve() == self.output.resolve():
            return stored
        origin = read_json(source) if source.is_file() else None
        is_its_record = stored is not None and (origin is None or _beginning(origin) == _beginning(stored))
        return stored if is_its_record else origin


def _beginning(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != RESUMES}


def resumption(
    now: dict[str, Any], output: Path, resume_from: str | None, results: bool, accepted: bool
) -> Resumption | None:
    """The run that continues, its options compared with those of its record; None for a new run.

    Args:
        now: the record of the options of now.
        output: output folder of the run.
        resume_from: the checkpoint to continue from.
        results: the output folder contains trained weights.
        accepted: `--resume_changed True` was given.

    Raises:
        FlagError: options that change the result differ, and the differences are not accepted.
        CheckpointError: the record is damaged.
    """
    folder = None if resume_from is None else Path(resume_from)
    changes = refuse_changes(now, output, folder, results, accepted)
    if folder is None:
        return None
    place = find_record(output, folder)
    if place is None:
        notes = [f"{folder} has no {RUN_FILE}: whether the options are those of its run cannot be checked"]
        return Resumption(folder, now, output, accepts_changes=accepted, notes=notes)
    then = read_record(place)
    notes = ["--resume_changed True: with changed options\n  " + "\n  ".join(changes)] if changes else []
    before, after = batch_shares(then), batch_shares(now)
    if before is not None and after is not None and before != after and not changes:
        notes.append(_shares_note(before, after))
    return Resumption(folder, now, output, changes, accepted, length_is_free(then, now), notes)


def _shares_note(before: Shares, after: Shares) -> str:
    return (
        f"the global batch is the same, as {describe_shares(after)} instead of {describe_shares(before)}: numbers are "
        "equal up to the order of sums, apart from random draws and from losses that are means over a micro batch"
    )
