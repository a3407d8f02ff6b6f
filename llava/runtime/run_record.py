"""`run.json`: resolved options, seed, package versions and commit of a run, written before the first step."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from llava.runtime.output import replace_text
from llava.runtime.program import package_versions
from llava.runtime.unchanged import FINGERPRINTS, WORLD, fingerprints, flat
from llava.runtime.weights.completeness import RUN_FILE

__all__ = ["RUN_FILE", "copy_run_record", "run_record", "write_run_record"]


class Options(Protocol):
    """All options of one run of a training program."""

    training: Any

    def to_dict(self) -> dict[str, Any]:
        """Resolved values as JSON types."""


def _commit() -> str | None:
    """Commit of the source tree this package is run from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def run_record(args: Options) -> dict[str, Any]:
    """What `run.json` says of a run."""
    arguments = args.to_dict()
    return {
        "arguments": arguments,
        "seed": args.training.seed,
        WORLD: args.training.world_size,
        FINGERPRINTS: fingerprints(flat({"arguments": arguments})),
        "versions": package_versions(),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_run_record(args: Options, record: dict[str, Any] | None = None) -> Path:
    """Write `run.json` into the output folder of a run.

    Args:
        args: options of the run.
        record: as `run_record` gives it, where that was done before.

    Returns:
        Path of the file. It is written whole or not at all.

    Raises:
        FlagError: the output folder cannot be written.
    """
    folder = Path(args.training.output_dir)
    record = run_record(args) if record is None else record
    return replace_text(folder / RUN_FILE, json.dumps(record, indent=2, sort_keys=True) + "\n")


def copy_run_record(output_dir: Path, checkpoint: Path) -> None:
    """Put the record of a run into one of its checkpoints."""
    source = output_dir / RUN_FILE
    if source.is_file() and source.parent.resolve() != checkpoint.resolve():
        shutil.copyfile(source, checkpoint / RUN_FILE)
