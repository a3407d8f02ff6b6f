"""`run.json`: resolved options, seed, package versions and commit of a run, written before the first step."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from llava.output import replace_text
from llava.train.arguments import RunArguments
from llava.utils import package_versions

RUN_FILE = "run.json"


def _commit() -> str | None:
    """Commit of the source tree this package is run from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def write_run_record(args: RunArguments) -> Path:
    """Write `run.json` into the output folder of a run.

    Returns:
        Path of the file. It is written whole or not at all.

    Raises:
        FlagError: the output folder cannot be written.
    """
    folder = Path(args.training.output_dir)
    record = {
        "arguments": args.to_dict(),
        "seed": args.training.seed,
        "versions": package_versions(),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return replace_text(folder / RUN_FILE, json.dumps(record, indent=2, sort_keys=True) + "\n")


def copy_run_record(output_dir: Path, checkpoint: Path) -> None:
    """Put the record of a run into one of its checkpoints."""
    source = output_dir / RUN_FILE
    if source.is_file() and source.parent.resolve() != checkpoint.resolve():
        shutil.copyfile(source, checkpoint / RUN_FILE)
