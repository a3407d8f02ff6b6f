"""The two shell scripts pass the original's flags and values."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_lines import Snippet, run_with_stand_ins
from tests.golden import load_case

SCRIPTS = load_case("hydralora", "cli_flags")[0]["scripts"]


def flags(name: str, folder: Path) -> dict[str, str | bool]:
    snippet = Snippet("block", f"OUTPUT=path_to_output/lora_model bash scripts/hydralora/{name}\n")
    (command,) = run_with_stand_ins(snippet, folder)
    words = command[command.index("hydralora.finetune") + 1 :]
    found: dict[str, str | bool] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word] = True if following.startswith("--") else following
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_values(name: str, tmp_path: Path) -> None:
    ours = flags(name, tmp_path)
    if "--deepspeed" in ours:
        assert str(ours["--deepspeed"]).endswith("scripts/hydralora/ds_zero3_offload.json")
        ours["--deepspeed"] = "ds_zero3_offload.json"
    assert ours == SCRIPTS[name]["arguments"]
