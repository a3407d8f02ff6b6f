"""LaVIN's scripts: the original's flags and values, and a real run of each on the tiny model."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from pathlib import Path

import pytest

from mma.lavin import eval as mma_eval
from mma.lavin import eval_mme
from mma.lavin.data.mixture import main as mix
from mma.lavin.train import main as train
from tests import command_lines
from tests.command_lines import ROOT, Call, Snippet
from tests.golden import load_case
from tests.mma.lavin.lavin_files import LavinFiles
from tests.mma.lavin.test_data import IMAGES, save_mixture_inputs
from tests.mma.lavin.test_scoring import save_benchmark

SCRIPTS = load_case("lavin", "cli_flags")[0]["scripts"]
LITE_WITH_VICUNA = {f"finetuning_sqa_vicuna_{size}_lite.sh": f"finetuning_sqa_{size}_lite.sh" for size in ("7b", "13b")}
"""Named in the original's README and missing there; each with the script whose values it has."""

LEFT_OUT = {"--data_path", "--tokenizer_path"}
"""Nothing reads them, in the original either."""

FOR_SCIENCEQA = {"--data_root", "--caption_file", "--split", "--max_batch_size", "--prompt_format"}
TINY = "--device cpu --batch_size 2 --accum_iter 1 --max_steps 2 --num_workers 0 --hidden_proj 16"


def calls(script: str, folder: Path, environment: str = "", extra: str = "") -> dict[str, tuple[list[str], Call]]:
    """What a script starts, by program: the launcher's own words, and the call."""
    folder.mkdir(parents=True)
    snippet = Snippet("block", f"{environment} bash scripts/{script} {extra}\n")
    found = {}
    for command in command_lines.run_with_stand_ins(snippet, folder):
        call = command_lines.our_call(command)
        assert call is not None
        found[call.module] = (command[: command.index("-m")], call)
    return found


def flags(call: Call) -> dict[str, str | bool]:
    words = [*call.arguments, "--"]
    return {
        word: True if following.startswith("--") else following
        for word, following in itertools.pairwise(words)
        if word.startswith("--")
    }


def test_every_script_of_the_original_is_here() -> None:
    ours = {path.name for path in (ROOT / "scripts").glob("*.sh")}
    assert ours >= {*SCRIPTS, *LITE_WITH_VICUNA}
    assert len(SCRIPTS) == 9


@pytest.mark.parametrize("script", [*SCRIPTS, *LITE_WITH_VICUNA])
def test_values_are_those_of_the_original(script: str, tmp_path: Path) -> None:
    started = calls(script, tmp_path / "shell")
    modules = {"train.py": "mma.train", "eval.py": "mma.eval", "eval_mme.py": "mma.eval_mme"}
    for original in SCRIPTS[LITE_WITH_VICUNA.get(script, script)]:
        launcher, call = started.pop(modules[original["program"]])
        count = launcher[launcher.index("--nproc_per_node") + 1]
        assert count == original["launcher"]["--nproc_per_node"]
        expected = {name: value for name, value in original["arguments"].items() if name not in LEFT_OUT}
        ours = flags(call)
        if original["program"] == "train.py":
            assert ours.pop("--data_root") == "../data"
            assert ours.pop("--caption_file") == "../data/captions.json"
        elif original["program"] == "eval.py":
            checkpoint, folder = str(expected.pop("--adapter_path")), str(ours.pop("--adapter_path"))
            assert checkpoint.startswith(folder.replace("Vicuna-", "") if script in LITE_WITH_VICUNA else folder)
        else:
            assert ours.pop("--root_dir_") == "../data/mme"
            assert (ours.pop("--llm_model"), expected.pop("--llm_model")) == ("13B", "7B")  # docs/differences.md
            expected = {name: value for name, value in expected.items() if name not in FOR_SCIENCEQA}
            ours = {name: value for name, value in ours.items() if name not in FOR_SCIENCEQA}
        if script in LITE_WITH_VICUNA:
            assert ours.pop("--use_vicuna")
            expected.pop("--output_dir", None)
            ours.pop("--output_dir", None)
        texts = {name: str(value) for name, value in expected.items()}
        assert {name: str(value) for name, value in ours.items()} == texts
    assert not started


def environment_for(files: LavinFiles, output: Path, data: Path | None = None, **more: object) -> str:
    paths = {
        "WEIGHTS": files.weights,
        "DATA": data or files.data,
        "VISION_TOWER": files.tower,
        "OUTPUT": output,
        **more,
    }
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in paths.items())


@pytest.mark.parametrize(
    "script", [script for script in (*SCRIPTS, *LITE_WITH_VICUNA) if script.startswith("finetuning_sqa")]
)
def test_training_and_evaluation_run(script: str, lavin_files: LavinFiles, tmp_path: Path) -> None:
    if "lite" in script:
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    limits = {"EVAL_FLAGS": "--device cpu --limit 1 --max_new_tokens 3"}
    environment = environment_for(lavin_files, tmp_path / "out", **limits)
    started = calls(script, tmp_path / "shell", environment, TINY)
    output = train(list(started["mma.train"][1].arguments))
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 2
    words = list(started["mma.eval"][1].arguments)
    found = mma_eval.main(words)
    assert found.count["acc_average"] == 1
    assert (output / "scienceqa-test" / "scores.json").is_file()


@pytest.mark.parametrize("kind", ["file", "folder", "without a tower"])
def test_a_file_of_adapters_is_given_the_tower_of_the_environment(kind: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "lavin.pth"
    checkpoint.mkdir() if kind == "folder" else checkpoint.touch()
    tower = "" if kind == "without a tower" else "VISION_TOWER=./tower"
    started = calls("eval_mme_benchmark.sh", tmp_path / "shell", f"{tower} CHECKPOINT={shlex.quote(str(checkpoint))}")
    found = flags(started["mma.eval_mme"][1]).get("--vision_tower")
    assert found == ("./tower" if kind == "file" else None)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.startswith("vl_instruction_tuning")])
def test_the_chatbot_trains_and_answers_mme(script: str, lavin_files: LavinFiles, tmp_path: Path) -> None:
    data = tmp_path / "data"
    save_mixture_inputs(data)
    mixed = mix(["--data_root", str(data)])
    coco = data / "images" / "train2014"
    coco.mkdir(parents=True)
    for item in json.loads(mixed.read_text())["all"]:
        if item["image"]:
            shutil.copy(IMAGES / "12.png", coco / f"COCO_train2014_{item['image']}")
    environment = environment_for(lavin_files, tmp_path / "out", data)
    started = calls(script, tmp_path / "shell", environment, TINY)
    output = train(list(started["mma.train"][1].arguments))
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 2
    save_benchmark(tmp_path / "mme")
    for path in (tmp_path / "mme").rglob("*.[jp][pn]g"):
        shutil.copy(IMAGES / "7.png", path)
    environment = environment_for(lavin_files, output, CHECKPOINT=output, MME=tmp_path / "mme")
    extra = "--device cpu --limit 3 --max_new_tokens 2"
    started = calls("eval_mme_benchmark.sh", tmp_path / "mme-shell", environment, extra)
    scores = eval_mme.main(list(started["mma.eval_mme"][1].arguments))
    assert sum(score.images for score in scores.values()) == 2
