"""Every program asks a model with the template of its training; a folder's name decides only where nothing says it."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.conversation import conv_templates
from llava.data.templates import select_template
from llava.data.trained_template import same_template, trained_template
from llava.errors import CheckpointError, FlagError
from llava.eval import __main__ as benchmark_program
from llava.eval import long_answers, run_llava
from llava.eval.answering import loading, long_options, runner
from llava.eval.answering import question_run as question_program
from llava.eval.answering.conv_mode import choose_conv_mode, conv_mode_of_questions, conv_mode_of_turns
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.options import Fallback
from llava.eval.benchmarks import find
from llava.eval.lmms import model as lmms
from llava.serve import api, cli
from tests.llava.data.test_chat_template import CHATML, byte_tokenizer

NAMES = ("mine", "llava-plain", "llava-explain-lora", "llava-v1.5-7b", "llava-v1.6-mistral-7b", "llava-llama-2-mpt")
"""Folders whose words mean all kinds of templates, or a model after stage 1, to upstream."""

Say = Callable[[Path, str], None]


def in_config(folder: Path, template: str) -> None:
    (folder / "config.json").write_text(json.dumps({"conversation_template": template}))


def in_record(folder: Path, template: str) -> None:
    """As folders of earlier versions say it."""
    (folder / "config.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps({"arguments": {"model": {"version": template}, "program": {}}}))


def in_both(folder: Path, template: str) -> None:
    in_record(folder, "llava_llama_2")
    in_config(folder, template)


WAYS = {"config.json": in_config, "run.json": in_record, "config.json before run.json": in_both}


def folder_of(tmp_path: Path, name: str, say: Say | None = None, template: str = "chatml_direct") -> Path:
    folder = tmp_path / name
    folder.mkdir()
    if say is not None:
        say(folder, template)
    return folder


@pytest.mark.parametrize("name", [*NAMES, "checkpoint-20"])
@pytest.mark.parametrize("say", WAYS)
def test_the_training_decides_and_not_the_name(
    say: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(folder_of(tmp_path, name, WAYS[say]))
    assert choose_conv_mode(None, folder) == "chatml_direct"
    assert conv_mode_of_questions(Fallback("llava_v1"), folder) == "chatml_direct"
    assert conv_mode_of_turns(Fallback("llava_v0"), folder) == "chatml_direct"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("choose", [choose_conv_mode, conv_mode_of_questions, conv_mode_of_turns])
def test_a_template_against_the_training_is_said(
    choose: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path, "llava-v1.5-7b", in_config)
    assert choose("llava_v1", str(folder)) == "llava_v1"
    out = capsys.readouterr().out
    assert out == (
        f"[WARNING] {folder} was trained with the template 'chatml_direct' ({folder / 'config.json'}), but --conv-mode "
        "asks for 'llava_v1': using 'llava_v1'\n"
    )
    assert choose("mistral_direct", str(folder)) == "mistral_direct", "a second name of the same template"
    assert capsys.readouterr().out == ""
    with pytest.raises(FlagError, match="--conv-mode v9: no such template"):
        choose("v9", str(folder))


def test_a_second_name_of_the_default_is_kept(tmp_path: Path) -> None:
    """So answers that were begun by an earlier version, or by a script with `vicuna_v1`, are continued."""
    folder = str(folder_of(tmp_path, "mine", in_config, "v1"))
    assert conv_mode_of_questions(Fallback("vicuna_v1"), folder) == "vicuna_v1"
    assert conv_mode_of_questions(Fallback("llava_v1"), folder) == "v1"
    assert same_template("v0", "default")
    assert not same_template("v0", "llava_v0")
    assert not same_template("tokenizer", "v1")


@pytest.mark.parametrize(
    ("name", "guess", "questions"),
    [
        ("mine", "llava_v0", "v1"),
        ("llava-v1.5-7b", "llava_v1", "v1"),
        ("llava-v1.6-mistral-7b", "mistral_instruct", "v1"),
        ("llava-plain", "llava_v0", "v1_mmtag"),
        ("llava-plain-finetune", "llava_v0", "v1"),
    ],
)
@pytest.mark.parametrize(
    "record", [None, {"arguments": {}}, {"arguments": {"model": {"version": "v1"}, "program": {"a": 1}}}]
)
def test_a_folder_that_does_not_say_is_asked_by_its_name(
    record: dict[str, Any] | None, name: str, guess: str, questions: str, tmp_path: Path
) -> None:
    """Upstream's way; also for what a program with prompts of its own (LaVIN's) has trained."""
    folder = folder_of(tmp_path, name)
    (folder / "config.json").write_text('{"model_type": "llava_llama"}')
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    assert trained_template(folder) is None
    assert choose_conv_mode(None, str(folder)) == guess
    assert conv_mode_of_questions(Fallback("v1"), str(folder)) == questions
    assert conv_mode_of_turns(Fallback("v1"), str(folder)) == "v1"


def test_a_form_that_does_not_exist_is_not_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(folder_of(tmp_path, "llava-explain-lora"))
    assert conv_mode_of_questions(Fallback("vicuna_v1"), folder) == "vicuna_v1"
    assert "mmtag" not in capsys.readouterr().out


@pytest.mark.parametrize(("version", "mode"), [("v0", "v1"), ("v0.5", "v1"), ("v1", "v1"), ("tokenizer", "tokenizer")])
def test_a_version_of_an_earlier_run_as_conv_mode(version: str, mode: str, tmp_path: Path) -> None:
    assert choose_conv_mode(None, str(folder_of(tmp_path, "mine", in_record, version))) == mode


@pytest.mark.parametrize("say", [in_config, in_record])
def test_a_template_that_does_not_exist_names_its_file(say: Say, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "mine", say, "v9")
    file = "config.json" if say is in_config else "run.json"
    with pytest.raises(
        CheckpointError, match=rf"{file}: its '\w+' is 'v9', and there is no such template; known: .*'v1'"
    ):
        choose_conv_mode(None, str(folder))


@pytest.fixture
def trained(tmp_path: Path, checkpoint: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The golden model as a run with `--version mpt` would have left it, under a name that means others."""
    folder = tmp_path / "llava-explain-v1-lora"
    shutil.copytree(checkpoint, folder, copy_function=shutil.copyfile)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"conversation_template": "mpt"}))
    for module in (question_program, loading, lmms):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: loaded)
    return folder


PROGRAMS = ("model_vqa", "model_vqa_loader", "model_vqa_mmbench", "model_vqa_qbench", "model_vqa_science")


@pytest.mark.parametrize("package", ["llava.eval", "llava.dynamic_eval"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_of_questions_knows_its_default_from_a_choice(name: str, package: str) -> None:
    parser = importlib.import_module(f"{package}.{name}").build_parser()
    assert isinstance(parser.parse_args([]).conv_mode, Fallback)
    chosen = parser.parse_args(["--conv-mode", "llava_v1"]).conv_mode
    assert not isinstance(chosen, Fallback)


@pytest.mark.parametrize("benchmark", ["textvqa", "qbench"])
def test_the_default_of_a_benchmark_is_no_choice(benchmark: str, tmp_path: Path) -> None:
    parser, one = benchmark_program.build_parser(), find(benchmark)
    words = [benchmark, "--model-path", str(tmp_path)]
    default = benchmark_program.fill_in(parser.parse_args(words), one).conv_mode
    assert isinstance(default, Fallback)
    assert default == one.conv_mode
    chosen = benchmark_program.fill_in(parser.parse_args([*words, "--conv-mode", one.conv_mode]), one).conv_mode
    assert not isinstance(chosen, Fallback)


@pytest.mark.parametrize(("wanted", "used"), [(None, "mpt"), ("vicuna_v1", "vicuna_v1")])
def test_questions_are_asked_as_in_the_training(
    wanted: str | None,
    used: str,
    trained: Path,
    question_file: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = tmp_path / "answers.jsonl"
    words = f"--model-path {trained} --question-file {question_file} --image-folder {image_folder} --limit 2"
    words += f" --answers-file {answers} --temperature 0 --max_new_tokens 2 --device cpu"
    asked: list[str] = []
    make_prompt = question_program.answer_tasks

    def noted(*args: Any, conv_mode: str, **options: Any) -> Any:
        asked.append(conv_mode)
        return make_prompt(*args, conv_mode=conv_mode, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(question_program, "answer_tasks", noted)
        main = importlib.import_module("llava.eval.model_vqa_loader").main
        main([*words.split(), *(["--conv-mode", wanted] if wanted else [])])
    assert asked == [used]
    settings = json.loads(answers.with_name("answers.jsonl.run.json").read_text())["settings"]
    assert settings["conv_mode"] == used
    assert ("was trained with the template 'mpt'" in capsys.readouterr().out) == (wanted is not None)


def test_the_server_asks_as_in_the_training(trained: Path) -> None:
    assert api.settings_of(api.build_parser().parse_args(["--model-path", str(trained)])).conv_mode == "mpt"


def test_the_terminal_asks_as_in_the_training(trained: Path) -> None:
    chat = cli.start_chat(cli.build_parser().parse_args(["--model-path", str(trained), "--device", "cpu"]))
    assert chat.conversation.system == conv_templates["mpt"].system


def test_one_question_is_asked_as_in_the_training(
    trained: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    make_prompt = runner.make_prompt

    def noted(key: str, task: Any, loaded: LoadedModel, conv_mode: str) -> Any:
        asked.append(conv_mode)
        return make_prompt(key, task, loaded, conv_mode)

    monkeypatch.setattr(runner, "make_prompt", noted)
    words = ["--model-path", str(trained), "--image-file", str(image_folder / "im0.png"), "--query", "What?"]
    run_llava.main([*words, "--temperature", "0", "--max_new_tokens", "1", "--device", "cpu"])
    assert asked == ["mpt"]


def test_lmms_asks_as_in_the_training(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lmms.BatchedModel(str(trained), device="cpu").conv_mode == "mpt"
    assert lmms.BatchedModel(str(trained), device="cpu", conv_template="v1").conv_mode == "v1"
    assert "but conv_template asks for 'v1'" in capsys.readouterr().out


@pytest.mark.parametrize("rounds", [1, 2])
def test_long_answers_are_asked_for_as_in_the_training(
    rounds: int, trained: Path, loaded: LoadedModel, image_folder: Path, tmp_path: Path
) -> None:
    turns = [("human", "<image>\nWhat?"), ("gpt", "A lake."), ("human", "Red?"), ("gpt", "No.")]
    row = {"id": 0, "image": "im0.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    words = ["--model-path", str(trained), "--question-file", str(tmp_path / "rows.json"), "--device", "cpu"]
    words += ["--image-folder", str(image_folder), "--answers-file", str(tmp_path / "out.jsonl")]
    args = long_options.build_parser("x", "y", generates=False).parse_args(words)
    path = long_answers.main(args, "ppl", multi_round=rounds == 2, load=lambda *_, **__: loaded)
    settings = json.loads(path.with_name("out.jsonl.run.json").read_text())["settings"]
    assert settings["conv_mode"] == "mpt"
    assert len(json.loads(path.read_text())["turns"]) == rounds


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("vicuna_v1", "USER:Red?ASSISTANT:"),
        ("v1_mmtag", "USER:Red?ASSISTANT:"),
        ("chatml_direct", "<|im_end|><|im_start|>user\nRed?<|im_end|><|im_start|>assistant\n"),
        ("llava_llama_2", " </s><s>[INST] Red? [/INST]"),
        ("v0", "###Human: Red?###Assistant:"),
    ],
)
def test_a_later_turn_is_that_of_the_template(mode: str, expected: str) -> None:
    """Of v1 it has the words of the original, which are those of that template but for blanks."""
    assert long_answers.later_turn(conv_templates[mode].copy(), "Red?") == expected


def test_a_later_turn_of_the_tokenizers_own_template() -> None:
    template = select_template("tokenizer", byte_tokenizer(CHATML))
    expected = "<|im_end|>\n<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n"
    assert long_answers.later_turn(template, "Red?") == expected
