"""Numbers that decode nothing are refused by every program that evaluates or serves, before a model is loaded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llava.errors import FlagError, LlavaError
from llava.eval.answering.generation import GenerationOptions
from llava.eval.lmms.model import BatchedModel
from llava.eval.lmms.requests import generation_options
from tests.golden import golden_dir
from tests.mma.lavin.lavin_files import LavinFiles
from tests.reliability.values import ABSENT, COUNTED, INF, NAN, POSITIVE_VALUES, SIGNLESS, rows

IMAGES = golden_dir("llava") / "data" / "images"
# Evaluation and serving

DECODING = {
    "temperature": SIGNLESS,
    "top_p": ("-0.1", "1.1", "nan", "inf"),
    "num_beams": COUNTED,
    "max_new_tokens": COUNTED,
}
RUN = {"batch-size": COUNTED, "limit": COUNTED, "num-workers": ("-1",), "num-chunks": COUNTED}
QUESTION = {"question_id": 0, "text": "What is a lake?"}


def with_questions(tmp_path: Path) -> list[str]:
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTION) + "\n")
    return ["--question-file", str(tmp_path / "q.jsonl"), "--answers-file", str(tmp_path / "a.jsonl")]


def long_words(tmp_path: Path) -> list[str]:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Water."}]
    (tmp_path / "q.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    return ["--question-file", str(tmp_path / "q.json"), "--answers-file", str(tmp_path / "a.jsonl")]


def one_image(tmp_path: Path) -> list[str]:
    return ["--image-file", str(IMAGES / "im0.png"), "--query", "What?"]


def lavin_eval(tmp_path: Path) -> list[str]:
    return [
        *("--ckpt_dir", ABSENT, "--adapter_path", str(tmp_path / "absent"), "--max_seq_len", "512"),
        *("--output_dir", str(tmp_path / "out"), "--max_batch_size", "4"),
    ]


MODEL = ["--model-path", ABSENT]
EVALUATION: dict[str, tuple[str, Callable[[Path], list[str]], dict[str, Sequence[str]]]] = {
    "model_vqa_loader": ("llava.eval.model_vqa_loader", with_questions, DECODING | RUN),
    "model_vqa": ("llava.eval.model_vqa", with_questions, DECODING | RUN),
    "run_llava": ("llava.eval.run_llava", one_image, DECODING),
    "ppl": ("llava.dynamic_eval.model_lvis_for_ppl", long_words, {"temperature": SIGNLESS, "num-chunks": COUNTED}),
    "meteor": (
        "llava.dynamic_eval.model_lvis_for_meteor",
        long_words,
        {"temperature": SIGNLESS, "max-new-tokens": COUNTED},
    ),
    "visualize": (
        "llava.dynamic_eval.visualize",
        one_image,
        {"temperature": SIGNLESS, "max_new_tokens": COUNTED, "num_beams": COUNTED},
    ),
    "cli": (
        "llava.serve.cli",
        lambda _: [],
        {"temperature": SIGNLESS, "top_p": ("-0.1", "1.1", "nan"), "max-new-tokens": COUNTED},
    ),
    "api": (
        "llava.serve.api",
        lambda _: [],
        {
            "temperature": ("-1", "nan", "inf", "2.5"),
            "max-new-tokens": COUNTED,
            "token-limit": COUNTED,
            "batch-size": COUNTED,
            "max-waiting": COUNTED,
            "gather-ms": SIGNLESS,
            "request-timeout": POSITIVE_VALUES,
            "max-images": COUNTED,
            "max-image-mb": POSITIVE_VALUES,
            "max-image-pixels": COUNTED,
            "max-body-mb": POSITIVE_VALUES,
            "port": ("-1", "65536"),
        },
    ),
    "mma.eval": (
        "mma.eval",
        lavin_eval,
        {
            "generation_temperature": SIGNLESS,
            "top_p": ("-0.1", "1.1", "nan"),
            "max_new_tokens": COUNTED,
            "max_batch_size": COUNTED,
            "limit": COUNTED,
            "num-workers": ("-1",),
            "temperature": POSITIVE_VALUES,
            "adapter_scale": POSITIVE_VALUES,
            "adapter_dim": COUNTED,
            "hidden_proj": COUNTED,
            "max_seq_len": ("0", "1"),
        },
    ),
    "mma.demo": (
        "mma.demo",
        lambda tmp_path: ["--ckpt_dir", ABSENT, "--adapter_path", str(tmp_path / "absent")],
        {
            "temperature": POSITIVE_VALUES,
            "max_new_tokens": COUNTED,
            "max_batch_size": COUNTED,
            "max_seq_len": ("0", "1"),
            "server_port": ("-1", "65536"),
        },
    ),
}


def run_evaluation(program: str, tmp_path: Path, lavin: LavinFiles, *words: str) -> None:
    name, own, _ = EVALUATION[program]
    model = [] if name.startswith("mma") else MODEL
    data = ["--data_root", str(lavin.data), "--split", "train"] if name == "mma.eval" else []
    importlib.import_module(name).main([*model, *own(tmp_path), *data, "--device", "cpu", *words])


@pytest.mark.parametrize(("program", "flag", "value"), rows({name: own for name, (_, _, own) in EVALUATION.items()}))
def test_evaluation_and_serving(
    program: str, flag: str, value: str, lavin: LavinFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.eval.long_answers.find_wordnet", lambda: None)
    with pytest.raises(FlagError) as raised:
        run_evaluation(program, tmp_path, lavin, f"--{flag}={value}")
    assert f"--{flag}" in str(raised.value)
    assert ABSENT not in str(raised.value)
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("program", EVALUATION)
def test_evaluation_and_serving_get_as_far_as_the_model(
    program: str, lavin: LavinFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.eval.long_answers.find_wordnet", lambda: None)
    more = ["--port", "0"] if program == "api" else []
    with pytest.raises((LlavaError, OSError), match=r"/nonexistent"):
        run_evaluation(program, tmp_path, lavin, *more)


def test_no_tokens_of_a_benchmark_are_not_its_default(tmp_path: Path) -> None:
    main = importlib.import_module("llava.eval.__main__").main
    with pytest.raises(FlagError, match="--max_new_tokens 0"):
        main(["textvqa", "--model-path", ABSENT, "--data-dir", str(tmp_path), "--max_new_tokens", "0"])


@pytest.mark.parametrize("name", ["max_batch_size", "workers"])
def test_lmms_eval(name: str) -> None:
    with pytest.raises(FlagError, match=f"--{name} -1"):
        BatchedModel(ABSENT, device="cpu", **{name: -1})


@pytest.mark.parametrize("given", [{"temperature": NAN}, {"temperature": INF}, {"num_beams": 0}, {"max_new_tokens": 0}])
def test_tasks_of_lmms_eval(given: dict[str, Any]) -> None:
    with pytest.raises(FlagError, match="task/test:0"):
        generation_options({"do_sample": True} | given, "task/test:0", 0)


@pytest.mark.parametrize("value", [NAN, INF, -1.0])
def test_decoding_options_in_python(value: float) -> None:
    GenerationOptions(temperature=0.0)
    with pytest.raises(FlagError, match="--temperature"):
        GenerationOptions(temperature=value)
