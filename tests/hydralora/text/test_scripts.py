"""The two shell scripts pass the original's flags and values."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from hydralora.finetune import main, parse_args
from hydralora.text.options import TrainingArguments
from hydralora.text.samples import read_samples
from llava.errors import FlagError
from playground.instructions import write_records
from tests.command_lines import ROOT, Snippet, run_with_stand_ins
from tests.golden import load_case
from tests.hydralora.text.test_finetune import CASE, command_line, save_base, save_data

EXAMPLE = ROOT / "scripts" / "hydralora" / "data" / "example_data"
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
    # The original's `data/example_data` is next to the script.
    for flag in ("--dataset_dir", "--validation_file"):
        ours[flag] = str(ours[flag]).replace("./scripts/hydralora/", "")
    assert ours == SCRIPTS[name]["arguments"]


@pytest.mark.parametrize(("visible", "processes"), [("0", "1"), ("4,5", "2"), (None, "4")])
def test_the_gpus_are_those_of_the_user(visible: str | None, processes: str, tmp_path: Path) -> None:
    """The original hides GPU 0 from one script, and shows four GPUs to the other one."""
    set_or_not = "unset CUDA_VISIBLE_DEVICES" if visible is None else f"export CUDA_VISIBLE_DEVICES={visible}"
    seen = f"""{set_or_not}
cat > seen <<'END'
#!/bin/sh
exec python -m hydralora.finetune "${{CUDA_VISIBLE_DEVICES-unset}}" "$@"
END
chmod +x seen
"""
    text = f"{seen}PYTHON=./seen bash scripts/hydralora/fine-tuning.sh\n"
    (tmp_path / "one").mkdir()
    (command,) = run_with_stand_ins(Snippet("block", text), tmp_path / "one")
    assert command[3] == (visible or "unset")
    text = f"{set_or_not}\nbash scripts/hydralora/fine-tuning_dp.sh\n"
    (tmp_path / "several").mkdir()
    (command,) = run_with_stand_ins(Snippet("block", text), tmp_path / "several")
    assert command[command.index("--nproc_per_node") + 1] == processes


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all GPUs are visible, the script would otherwise train by copies of the model in threads."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    save_base(tmp_path / "base")
    save_data(tmp_path / "data")
    with pytest.raises(FlagError, match=r"2 GPUs are visible to one process; .*--nproc_per_node 2"):
        parse_args(command_line(tmp_path, tmp_path / "out"))


def test_the_example_data_are_those_of_their_program(tmp_path: Path) -> None:
    """Written by a rule, in the format that the program reads; nothing of the validation file is trained on."""
    files = {path.name: path.read_text() for path in write_records(tmp_path)}
    assert files == {path.name: path.read_text() for path in EXAMPLE.glob("*.json")}
    train, test = (read_samples(EXAMPLE / name) for name in ("train.json", "test.json"))
    assert (len(train), len(test)) == (96, 16)
    assert not {(row["instruction"], row["input"]) for row in train} & {
        (row["instruction"], row["input"]) for row in test
    }
    for row in [*train, *test]:
        numbers = [int(word) for word in re.findall(r"\d+", row["instruction"] + row["input"])]
        letter = row["instruction"].split()[-2]
        expected = {
            0: str(sum(numbers)),
            1: ", ".join(sorted(row["input"].split(", "))),
            2: str(row["input"].count(letter)),
            3: str(max(numbers, default=0)),
        }[row["task_type"]]
        assert row["output"] == expected


def test_the_script_runs_on_the_example_data(tmp_path: Path) -> None:
    """Without DATA; the records are longer than those of the golden run, so a few are enough."""
    save_base(tmp_path / "base")
    shutil.copytree(EXAMPLE, tmp_path / "example_data")
    (tmp_path / "shell").mkdir()
    words = words_of(
        "fine-tuning.sh",
        tmp_path / "shell",
        f"MODEL={shlex.quote(str(tmp_path / 'base'))} OUTPUT={shlex.quote(str(tmp_path / 'out'))}",
        "--use_cpu True --max_steps 1 --report_to none",
    )
    words = [word.replace("./scripts/hydralora/data", str(tmp_path)) for word in words]
    main(words)
    assert "perplexity" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


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
