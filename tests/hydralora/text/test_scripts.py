"""The two shell scripts pass the original's flags and values."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from hydralora.finetune import main
from tests.command_lines import Snippet, run_with_stand_ins
from tests.golden import load_case
from tests.hydralora.text.test_finetune import CASE, save_base, save_data

SCRIPTS = load_case("hydralora", "cli_flags")[0]["scripts"]


def words_of(name: str, folder: Path, environment: str, extra: str = "") -> list[str]:
    """What a script passes to the program."""
    snippet = Snippet("block", f"{environment} bash scripts/hydralora/{name} {extra}\n")
    (command,) = run_with_stand_ins(snippet, folder)
    return command[command.index("hydralora.finetune") + 1 :]


def flags(name: str, folder: Path) -> dict[str, str | bool]:
    words = words_of(name, folder, "OUTPUT=path_to_output/lora_model")
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_on_a_tiny_model(name: str, tmp_path: Path) -> None:
    """The same flags on the CPU, in this process and without DeepSpeed."""
    save_base(tmp_path / "base")
    save_data(tmp_path / "data")
    (tmp_path / "data" / "test.json").write_text(json.dumps(CASE["records"][:2]))
    paths = {"MODEL": tmp_path / "base", "DATA": tmp_path / "data", "OUTPUT": tmp_path / "out"}
    (tmp_path / "shell").mkdir()
    environment = " ".join(f"{key}={shlex.quote(str(path))}" for key, path in paths.items())
    words = words_of(name, tmp_path / "shell", environment, "--use_cpu True --max_steps 2 --report_to none")
    if "--deepspeed" in words:
        place = words.index("--deepspeed")
        del words[place : place + 2]
    adapter = main(words)
    assert adapter == tmp_path / "out" / "sft_lora_model"
    assert (adapter / "adapter_model.safetensors").is_file()
    assert "perplexity" in json.loads((tmp_path / "out" / "eval_results.json").read_text())
