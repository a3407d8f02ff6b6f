"""Started by a launcher: several training runs one after another in the same processes, since starting costs most.

Usage: `several_runs.py RUNS.json`, a list of command lines for `llava/train/train.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llava.train.train import main

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        main(arguments)
