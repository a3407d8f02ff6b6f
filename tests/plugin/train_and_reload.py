"""Program of `test_plugin.py`: train two steps from a command line, load the checkpoint, print what happened as JSON.

It runs in a process of its own, because installed packages are found when a process starts. It names no extension.
Usage: python train_and_reload.py ANSWER.json [flags of llava.train.train ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from llava.extension import installed_extensions
from llava.model.builder import load_pretrained_model
from llava.train.train import main


def run(argv: list[str]) -> dict[str, object]:
    """Train, load the result and describe both."""
    output = main(argv)
    base = argv[argv.index("--model_name_or_path") + 1]
    _, model, _, _ = load_pretrained_model(str(output), base, output.name, device_map=None, device="cpu")
    parameters = dict(model.named_parameters())
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(3, 11)[None]).logits  # (1, 8, vocabulary)
    return {
        "installed": sorted(installed_extensions()),
        "attached": model.extensions.configs,
        "added": {
            name: parameters[name].tolist() for name in model.extensions.named_parameters(model) if name in parameters
        },
        "parameters": len(parameters),
        "logits": logits.float().sum().item(),
        "logged": sorted({key for entry in state["log_history"] for key in entry}),
    }


if __name__ == "__main__":
    answer = run(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(answer), encoding="utf-8")
