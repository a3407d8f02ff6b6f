"""Running PEFT's own tests with HydraLoRA, and the record of what they find, `found.json`.

    python -m tests.hydralora.peft_tests.record FOLDER SOURCE [PART ...]

runs the tests of a checkout of huggingface/peft and writes the record, or some parts of it. SOURCE says which version
the checkout is. The files below make their models themselves; what needs models of a hub, other devices than the CPU
or several processes is not covered.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
RECORD = HERE / "found.json"

CUSTOM = "tests/test_custom_models.py"
BATTERY = f"{CUSTOM}::TestPeftCustomModel"
PARTS: dict[str, list[str]] = {
    "dtypes": [BATTERY, "-k", "dtype_autocast"],
    "saving": [BATTERY, "-k", "save or load"],
    "merging": [BATTERY, "-k", "merge or forward"],
    "others": [BATTERY, "-k", "not (dtype_autocast or save or load or merge or forward)"],
    "several adapters": [CUSTOM, "-k", "not TestPeftCustomModel and not Fsdp"],
    "hotswap": ["tests/test_initialization.py::TestHotSwapping"],
}
"""What is run, in processes of their own: arguments of pytest by the name of the part."""

KINDS = {
    "passed": "passed",
    "refused": "refused",
    "skipped": "skipped",
    "explained": "failed for a known reason",
    "failed": "failed otherwise",
}
"""Outcomes of a test, and their words after a number."""

READ = [
    CUSTOM,
    "tests/testing_common.py",
    "tests/testing_utils.py",
    "tests/conftest.py",
    "tests/test_initialization.py",
]
"""Files of the checkout that decide what is found."""


def digests(checkout: Path) -> dict[str, str]:
    """SHA-256 of the files of a checkout that are run.

    Raises:
        FileNotFoundError: it is not a checkout of PEFT with its tests.
    """
    missing = [name for name in READ if not (checkout / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{checkout}: has no {missing}; expected a checkout of huggingface/peft")
    return {name: hashlib.sha256((checkout / name).read_bytes()).hexdigest() for name in READ}


def run(checkout: Path, part: str) -> dict[str, Any]:
    """Outcomes by test and refused rows of one part, as of `hydralora_in_peft.Found`.

    Raises:
        RuntimeError: pytest wrote none, since it could not read the tests.
    """
    paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    # As one process and without plugins of ours: the order of the tests decides which of them tries a refused row.
    options = ["-p", "hydralora_in_peft", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-q"]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "outcomes.json"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "--outcomes", str(output), *PARTS[part]],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if not output.is_file():
            raise RuntimeError(
                f"{part}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def differences(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """One line for each test or row whose outcome is not the recorded one, those included that only one side has."""
    lines = []
    for kind in ("outcomes", "refused_rows"):
        now, before = found[kind], recorded[kind]
        lines += [
            f"{name}: {now.get(name, 'not run')}; recorded: {before.get(name, 'nothing')}"
            for name in sorted(now.keys() | before.keys())
            if now.get(name) != before.get(name)
        ]
    return lines


def counts(part: Mapping[str, Any]) -> Counter[str]:
    """Number of tests by outcome, one of `KINDS`."""
    return Counter(re.split("[:,]", outcome)[0] for outcome in part["outcomes"].values())


def line_of(name: str, part: Mapping[str, Any]) -> str:
    """The counts of a part in words."""
    numbers = counts(part)
    words = ", ".join(f"{numbers[kind]} {words}" for kind, words in KINDS.items())
    return f"PEFT's tests, {name}: {words}; {len(part['refused_rows'])} rows of their tables are refused as a whole"


def read() -> dict[str, Any]:
    """The record: `source` and `files` of the checkout, the `installed` version of PEFT, and `parts`."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def main(arguments: list[str] | None = None) -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("source")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    given = parser.parse_args(arguments)
    record = read() if RECORD.exists() else {"parts": {}}
    files = digests(given.folder)
    if given.parts and record.get("files", files) != files:
        parser.error(f"{RECORD}: its other parts are of {record['source']}; run all parts")
    for part in given.parts or PARTS:
        record["parts"][part] = run(given.folder, part)
        print(line_of(part, record["parts"][part]), flush=True)
        record |= {"source": given.source, "files": files, "installed": version("peft")}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
