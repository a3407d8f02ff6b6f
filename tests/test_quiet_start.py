"""What programs print when they start: our own lines, and none of a dependency that its reader could not use.

Each program is started as a person would, with `--help` and with a run on a tiny model; every line of both outputs has
to be one that `OURS` describes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.runtime.foreign_lines import FOREIGN_LINES, FOREIGN_WARNINGS
from tests.command_lines import ROOT
from tests.golden import golden_dir

LLAVA = golden_dir("llava")
LLAVA_WORDS = ("--model-path", str(LLAVA / "tiny-llava-v1.5"), "--device", "cpu")

HELP = (
    *("llava", "llava.train.train_mem", "llava.eval", "llava.serve.cli", "llava.serve.api"),
    "llava.serve.web",
    *("llava.convert", "llava.scripts"),
    *("hydralora.finetune", "mma.train", "moe_patch", "playground.demo"),
)

OURS = (
    r"",
    r"(\w[\w ]*: *)?\d+%\|.*",  # progress bars
    r"[│┏┃┡└╭╰├─━].*",  # tables, boxes and rules
    r"\{'[\w/]+': .*\}",  # metrics of an update
    r"What is trained *",
    r"(base|settings|tower|answer end|extensions|loss|data|evaluation|training|best|saving) {2,}.*",  # steps of a run
    r"attention: \w+",
    r"python -m (llava|hydralora|mma)\..*",
    r".*\.jsonl: \d+ (of \d+ questions are answered|answers; .*)",
    r"(Human|Assistant|USER|ASSISTANT):.*|exit\.\.\.|/image PATH \.\.\. .*",
    r"serving '.*' at .*",
    r"INFO: +[\d.]+:\d+ - \"GET /health HTTP/1.1\" 200 OK",  # the server: requests, start and stop
    r"INFO: +(Started|Finished) server process \[\d+\]",
    r"INFO: +(Waiting for application (startup|shutdown)|Application (startup|shutdown) complete|Shutting down)\.?",
    r"INFO: +Uvicorn running on .*",
    r".*-hf: writing the weights in the layout of transformers",
    r"--dataset_dir .* left out, by the name not for training; .*|\d+ of \d+ records left out: .*",
    r"trainable params: .*|\*+ train metrics \*+|\w+ += +[\d.:]+",
    r"import hydralora; .*|and is evaluated .*",
)
"""Every kind of line that the programs below print, as regular expressions for whole lines."""


def foreign(text: str) -> list[str]:
    """The lines of an output that none of `OURS` describes."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    return [line for line in lines if not any(re.fullmatch(pattern, line.strip()) for pattern in OURS)]


def surroundings() -> dict[str, str]:
    """What a person's shell has, without what these tests set for themselves."""
    hidden = ("TOKENIZERS_PARALLELISM", "WANDB_MODE", "DS_ACCELERATOR", "PYTEST_CURRENT_TEST")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}


def start(module: str, *words: str, folder: Path, said: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        env=surroundings(),
        input=said,
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("module", HELP)
def test_help_is_the_first_and_only_thing_printed(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = start(module, "--help", folder=tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    found = importlib.import_module(module)
    program = importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found
    expected = io.StringIO()
    monkeypatch.setattr(sys, "argv", [program.__file__, "--help"])
    with contextlib.redirect_stdout(expected), pytest.raises(SystemExit):
        program.main(["--help"])
    assert done.stdout == expected.getvalue()
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""


def train(folder: Path) -> tuple[str, ...]:
    data = ("--data_path", str(LLAVA / "data" / "finetune.json"), "--image_folder", str(LLAVA / "data" / "images"))
    sizes = ("--max_steps", "1", "--model_max_length", "512", "--per_device_train_batch_size", "2")
    methods = ("--use_lora", "True", "--lora_rank", "4", "--llm_moe", "True", "--llm_moe_num_experts", "3")
    return (
        *("--model_name_or_path", str(LLAVA / "tiny-llava-v1.5"), "--vision_tower", str(LLAVA / "tiny-clip")),
        *("--mm_projector_type", "mlp2x_gelu", "--version", "v1", "--use_cpu", "True", "--output_dir", "out"),
        *(*data, *sizes, *methods),
    )


def evaluate(folder: Path) -> tuple[str, ...]:
    row = {"question_id": 0, "image": "im0.png", "text": "What is this?"}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    files = ("--question-file", "questions.jsonl", "--answers-file", "answers.jsonl")
    return (*LLAVA_WORDS, *files, "--image-folder", str(LLAVA / "data" / "images"), "--max_new_tokens", "2")


def chat(folder: Path) -> tuple[str, ...]:
    return (
        *LLAVA_WORDS,
        "--image-file",
        str(LLAVA / "data" / "images" / "im0.png"),
        "--max-new-tokens",
        "2",
        "--temperature",
        "0",
    )


def finetune(folder: Path) -> tuple[str, ...]:
    from tests.hydralora.text.test_finetune import command_line, save_base, save_data

    save_base(folder / "base")
    save_data(folder / "data")
    return tuple(command_line(folder, folder / "out", max_steps=1))


def lavin(folder: Path) -> tuple[str, ...]:
    from tests.mma.lavin.lavin_files import save_lavin_files, tiny_words

    return tuple(tiny_words(save_lavin_files(folder / "lavin"), folder / "out", "--max_steps", "1"))


RUNS: dict[str, tuple[str, Callable[[Path], tuple[str, ...]], str]] = {
    "train": ("llava.train.train_mem", train, ""),
    "evaluate": ("llava.eval.model_vqa_loader", evaluate, ""),
    "chat": ("llava.serve.cli", chat, "Hello\n\n"),
    "finetune": ("hydralora.finetune", finetune, ""),
    "lavin": ("mma.train", lavin, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_prints_our_lines_alone(name: str, tmp_path: Path) -> None:
    module, words, said = RUNS[name]
    done = start(module, *words(tmp_path), folder=tmp_path, said=said)
    assert done.stdout.strip()
    assert foreign(done.stdout + "\n" + done.stderr) == []


@pytest.mark.slow
def test_the_server_starts_and_stops_with_our_lines_alone(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llava.serve.api", *LLAVA_WORDS, "--port", str(port)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=surroundings(), stdout=pipe, stderr=pipe, text=True) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.5)
        started = process.poll() is None
        process.terminate()
        out, err = process.communicate(timeout=120)
    assert started, out + err
    assert foreign(out + "\n" + err) == []


@pytest.mark.parametrize("name", FOREIGN_LINES)
def test_the_list_of_dropped_lines_is_that_of_the_installed_versions(name: str) -> None:
    """A dependency that words a line in another way would print it again."""
    modules = {"DeepSpeed": "deepspeed.accelerator.real_accelerator"}
    root, _, path = modules.get(name, name).partition(".")
    found = importlib.util.find_spec(root)  # not imported: both log when they are
    if found is None or found.submodule_search_locations is None:
        pytest.skip(f"{root} is not installed")
    text = (Path(found.submodule_search_locations[0]) / f"{path.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert FOREIGN_LINES[name] in text


@pytest.mark.parametrize(
    ("name", "first"), [*((name, "llava") for name in FOREIGN_LINES), ("bitsandbytes.backends.cpu.ops", "hydralora")]
)
def test_exactly_these_lines_are_dropped(name: str, first: str, tmp_path: Path) -> None:
    """Of the same logger everything else is printed, and of another logger the same words are."""
    code = (
        f"import logging, {first}\n"
        f"for logger in ({name!r}, 'other'):\n"
        f"    logging.getLogger(logger).warning({FOREIGN_LINES[name]!r} + ': %s.', logger)\n"
        f"    logging.getLogger(logger).warning('something else of %s', logger)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=surroundings(), capture_output=True, text=True, check=True
    )
    expected = [f"something else of {name}", f"{FOREIGN_LINES[name]}: other.", "something else of other"]
    assert done.stderr.splitlines() == expected


@pytest.mark.parametrize("module", FOREIGN_WARNINGS)
def test_exactly_these_warnings_are_dropped(module: str, tmp_path: Path) -> None:
    """The same words from elsewhere, of another category, or other words from the same module are printed."""
    category, start = FOREIGN_WARNINGS[module]
    cases = [
        (f"{start} and more", category.__name__, module),
        (f"{start} and more", category.__name__, f"{module}2"),
        (f"{start} and more", "UserWarning", module),
        ("something else", category.__name__, module),
    ]
    lines = [f"warnings.warn_explicit({text!r}, {kind}, 'file', 1, module={name!r})" for text, kind, name in cases]
    code = "\n".join(["import warnings, llava", *lines])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=surroundings(), capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines() == [f"file:1: {kind}: {text}" for text, kind, _ in cases[1:]]


@pytest.mark.parametrize(
    "line",
    [
        "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'.",
        "[2026-11-21 10:00:00,000] [WARNING] [real_accelerator.py:213:get_accelerator] Setting accelerator to CPU.",
        "`torch_dtype` is deprecated! Use `dtype` instead!",
        "python/site-packages/torch/x.py:1: UserWarning: something",
        "The following generation flags are not valid and may be ignored: ['temperature'].",
    ],
)
def test_the_check_sees_a_foreign_line(line: str) -> None:
    """The negative control of `foreign`."""
    ours = "attention: sdpa\n│ all │ 1 │\n{'loss': '5.5', 'epoch': '0.2'}\n  0%|          | 0/2 [00:00<?, ?it/s]\r"
    assert foreign(ours) == []
    assert foreign(f"{ours}\n{line}\n") == [line]
