"""Program of `test_plugin.py`: train from command lines, load the checkpoints, and report what happened as JSON.

It runs in a process of its own, because installed packages are found when a process starts. It names no extension.
Usage: python train_and_reload.py RUNS.json REPORTS.json, where RUNS.json maps a name to flags of `llava.train.train`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from llava.errors import LlavaError
from llava.extension import installed_extensions
from llava.model.builder import load_pretrained_model
from llava.train.train import main


def report(argv: list[str]) -> dict[str, object]:
    """Train, load the result and describe both."""
    output = main(argv)
    base = argv[argv.index("--model_name_or_path") + 1]
    _, model, _, _ = load_pretrained_model(str(output), base, output.name, device_map=None, device="cpu")
    added = model.extensions.named_parameters(model)
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(3, 11)[None]).logits  # (1, 8, vocabulary)
    return {
        "installed": sorted(installed_extensions()),
        "attached": model.extensions.configs,
        "added": {name: parameter.tolist() for name, parameter in added.items()},
        "parameters": sorted(name for name, _ in model.named_parameters()),
        "logits": logits.flatten().tolist()[:1000],
        "logged": sorted({key for entry in state["log_history"] for key in entry}),
    }


def main_program(runs_file: Path, reports_file: Path) -> None:
    """Do all runs; one that is refused is reported with its message."""
    reports: dict[str, dict[str, object]] = {}
    for name, argv in json.loads(runs_file.read_text(encoding="utf-8")).items():
        try:
            reports[name] = report(argv)
        except LlavaError as error:
            reports[name] = {"error": str(error)}
    reports_file.write_text(json.dumps(reports), encoding="utf-8")


if __name__ == "__main__":
    main_program(Path(sys.argv[1]), Path(sys.argv[2]))
