"""The training scripts: flags and values of upstream's scripts of the same names, and a real run of each.

`upstream_recipes.json` holds what the scripts of upstream (commit c121f04) pass, with MODEL_VERSION=vicuna-v1-3-7b and
PROMPT_VERSION=v1 where those are left to the user.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from llava.eval import model_vqa_loader
from llava.model.builder import load_pretrained_model
from llava.model.formats import inspect_checkpoint
from llava.train.train import main
from tests import command_lines
from tests.command_lines import ROOT, Snippet
from tests.golden import golden_dir

RECIPES: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("upstream_recipes.json").read_text())
HYDRA = "scripts/MLLM_HydraLoRA.sh"
SLURM = "scripts/slurm_finetune.sh"  # outside of a job it starts the processes of this machine
LLAVA = golden_dir("llava")

# On the tiny model: few updates, short sequences, no GPU. Everything else is what the script says.
TINY = (
    "--use_cpu True --tf32 False --max_steps 2 --model_max_length 512 --per_device_train_batch_size 2 --report_to none"
)


def flags_of(script: str, folder: Path, environment: str = "", extra: str = "") -> dict[str, str]:
    """What a script passes to the training program, flag by flag; the last value of a flag counts."""
    (folder / "shell").mkdir(parents=True)
    snippet = Snippet("block", f"{environment} bash {script} {extra}\n")
    (command,) = command_lines.run_with_stand_ins(snippet, folder / "shell")
    (start,) = [place for place, word in enumerate(command) if word.startswith("llava.train.train_")]
    words = command[start + 1 :]
    assert all(word.startswith("--") for word in words[::2])
    return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


def test_every_upstream_script_is_here() -> None:
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*.sh")}
    assert len(RECIPES) == 12
    assert ours >= set(RECIPES)


@pytest.mark.parametrize("script", RECIPES)
def test_values_are_those_of_upstream(script: str, tmp_path: Path) -> None:
    assert flags_of(script, tmp_path) == RECIPES[script]


def test_the_environment_chooses_launcher_and_zero(tmp_path: Path) -> None:
    environment = "LAUNCHER='torchrun --nproc_per_node 2' ZERO="
    (tmp_path / "shell").mkdir()
    snippet = Snippet("block", f"{environment} bash scripts/v1_5/finetune.sh --learning_rate 1\n")
    (command,) = command_lines.run_with_stand_ins(snippet, tmp_path / "shell")
    assert command[:5] == ["torchrun", "--nproc_per_node", "2", "-m", "llava.train.train_mem"]
    assert "--deepspeed" not in command
    assert command[-2:] == ["--learning_rate", "1"]


@pytest.mark.parametrize(
    ("launcher", "option"),
    [
        ("", "--module"),
        ("deepspeed --hostfile scripts/hostfile", "--module"),
        ("srun deepspeed", "--module"),
        ("python", "-m"),
        ("torchrun --nproc_per_node 2", "-m"),
        ("accelerate launch --use_deepspeed", "-m"),
    ],
)
def test_every_launcher_is_told_that_the_program_is_a_module(launcher: str, option: str, tmp_path: Path) -> None:
    snippet = Snippet("block", f"LAUNCHER={shlex.quote(launcher)} bash scripts/v1_5/finetune.sh\n")
    (command,) = command_lines.run_with_stand_ins(snippet, tmp_path)
    assert command[command.index("llava.train.train_mem") - 1] == option


def is_v1_5(script: str) -> bool:
    """True for the recipes of LLaVA-1.5 and those built on them."""
    return "v1_5" in script or script in (HYDRA, SLURM)


def stage_1(folder: Path, script: str) -> Path:
    """A projector made by the pretraining script that belongs to `script`."""
    name = "scripts/v1_5/pretrain.sh" if is_v1_5(script) else "scripts/pretrain.sh"
    return train(name, folder / "stage1", LLAVA / "tiny-vicuna", LLAVA / "data" / "pretrain.json")


def train(script: str, output: Path, model: Path, data: Path, projector: Path | None = None) -> Path:
    """Run the training program in this process with what the script passes to it."""
    paths = {
        "MODEL": model,
        "VISION_TOWER": LLAVA / "tiny-clip",
        "DATA": data,
        "IMAGES": LLAVA / "data" / "images",
        "OUTPUT": output,
        "PROJECTOR": projector or "",
    }
    environment = "ZERO= " + " ".join(f"{name}={shlex.quote(str(path))}" for name, path in paths.items())
    flags = flags_of(script, output.with_name(f"{output.name}-shell"), environment, TINY)
    return main([word for name, value in flags.items() for word in (f"--{name}", value)])


@pytest.mark.parametrize("script", [*RECIPES, HYDRA, SLURM])
def test_runs_on_the_tiny_model(script: str, tmp_path: Path) -> None:
    """Stage 1, then the script; the projector is named as upstream's scripts name it."""
    if "qlora" in script:
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    if "pretrain" in script:
        output = stage_1(tmp_path, script)
        assert inspect_checkpoint(output).projector is not None
    else:
        projector = None if "task" in script else stage_1(tmp_path, script) / "mm_projector.bin"
        base = LLAVA / ("tiny-llava-v1.5" if "task" in script else "tiny-vicuna")
        output = train(script, tmp_path / "stage2", base, LLAVA / "data" / "finetune.json", projector)
    _, model, image_processor, _ = load_pretrained_model(str(output), device="cpu")
    assert image_processor is not None
    assert model.config.mm_projector_type == ("mlp2x_gelu" if is_v1_5(script) else "linear")
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_the_evaluation_script_answers_with_what_the_training_script_made(tmp_path: Path) -> None:
    data = LLAVA / "data"
    projector = stage_1(tmp_path, HYDRA) / "mm_projector.bin"
    trained = train(HYDRA, tmp_path / "hydra", LLAVA / "tiny-vicuna", data / "finetune.json", projector)
    image = next(row["image"] for row in json.loads((data / "finetune.json").read_text()) if "image" in row)
    questions = [{"question_id": number, "image": image, "text": f"Question {number}?"} for number in range(3)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    paths = {
        "MODEL": LLAVA / "tiny-vicuna",
        "CHECKPOINT": trained,
        "QUESTIONS": tmp_path / "questions.jsonl",
        "IMAGES": data / "images",
        "ANSWERS": tmp_path / "answers.jsonl",
    }
    environment = " ".join(f"{name}={shlex.quote(str(path))}" for name, path in paths.items())
    (tmp_path / "shell").mkdir()
    snippet = Snippet("block", f"{environment} bash scripts/MLLM_HydraLoRA_eval.sh --device cpu --max_new_tokens 3\n")
    (command,) = command_lines.run_with_stand_ins(snippet, tmp_path / "shell")
    model_vqa_loader.main(command[command.index("llava.eval.model_vqa_loader") + 1 :])
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == [0, 1, 2]
