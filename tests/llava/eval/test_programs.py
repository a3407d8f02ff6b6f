"""The programs from the command line: question file to answers file, interruptions, one question."""

from __future__ import annotations

import argparse
import importlib
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llava.conversation import conv_templates
from llava.errors import BadSampleError, FlagError
from llava.eval import model_qa, model_vqa, model_vqa_loader, run_llava
from llava.eval.answering import loading
from llava.eval.answering import question_run as program
from llava.eval.answering.loading import LoadedModel, choose_device, choose_dtype
from llava.eval.model_vqa_loader import main
from llava.runtime.tokenizer import load_tokenizer
from tests.golden import golden_dir

QUERY = "How many dogs are there?"


@pytest.fixture(autouse=True)
def _load_once(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    """The model is loaded once for all tests; the fixture `loaded` calls the same `load_model`."""
    for module in (program, loading):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: loaded)


def flags(checkpoint: Path, question_file: Path, image_folder: Path, answers: Path, **more: Any) -> list[str]:
    values = {
        "model-path": checkpoint,
        "question-file": question_file,
        "image-folder": image_folder,
        "answers-file": answers,
        "conv-mode": "vicuna_v1",
        "temperature": 0,
        "max_new_tokens": 6,
        "device": "cpu",
    }
    return [str(part) for name, value in (values | more).items() for part in (f"--{name}", value)]


def texts(path: Path) -> dict[int, str]:
    return {row["question_id"]: row["text"] for row in map(json.loads, path.read_text().splitlines())}


def test_the_finished_file_is_the_same_for_every_batch_size(
    checkpoint: Path, question_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    files = []
    for size in (1, 4):
        path = main(flags(checkpoint, question_file, image_folder, tmp_path / f"{size}.jsonl", **{"batch-size": size}))
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert list(texts(path)) == list(range(7))
    assert json.loads(files[0].splitlines()[0])["model_id"] == "tiny-llava-v1.5"


def test_an_interrupted_run_goes_on(
    checkpoint: Path,
    question_file: Path,
    image_folder: Path,
    tmp_path: Path,
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the third batch and in the middle of a line; then only the rest is asked, to the same bytes."""
    whole = main(flags(checkpoint, question_file, image_folder, tmp_path / "whole.jsonl")).read_bytes()
    generate, asked = loaded.model.generate, []

    def counted(inputs: Tensor, **arguments: Any) -> Tensor:
        if len(asked) == limit:
            raise KeyboardInterrupt
        asked.append(len(inputs))
        return generate(inputs, **arguments)

    monkeypatch.setattr(loaded.model, "generate", counted)
    run = flags(checkpoint, question_file, image_folder, tmp_path / "a.jsonl", **{"batch-size": 2})
    limit = 2
    with pytest.raises(KeyboardInterrupt):
        main(run)
    content = (tmp_path / "a.jsonl").read_bytes()
    assert content.count(b"\n") == 4
    (tmp_path / "a.jsonl").write_bytes(content[:-10])

    limit, asked[:] = 99, []
    assert main(run).read_bytes() == whole
    assert asked == [2, 2]

    asked.clear()
    assert main(run).read_bytes() == whole
    assert asked == []


def test_chunks_together_are_the_whole(
    checkpoint: Path, question_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    sampling = {"temperature": 0.8, "batch-size": 3}
    whole = main(flags(checkpoint, question_file, image_folder, tmp_path / "whole.jsonl", **sampling))
    parts = [
        main(
            flags(
                checkpoint,
                question_file,
                image_folder,
                tmp_path / f"{index}.jsonl",
                **sampling | {"num-chunks": 3, "chunk-idx": index},
            )
        )
        for index in range(3)
    ]
    assert b"".join(part.read_bytes() for part in parts) == whole.read_bytes()


def test_other_options_do_not_continue_a_file(
    checkpoint: Path, question_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = flags(checkpoint, question_file, image_folder, tmp_path / "a.jsonl")
    main(run)
    with pytest.raises(FlagError, match="max_new_tokens: 6 then, 7 now"):
        main([*run, "--max_new_tokens", "7"])
    main([*run, "--max_new_tokens", "7", "--restart"])
    main([*run, "--max_new_tokens", "7", "--batch-size", "5"])


def test_bad_rows_are_found_before_the_model_is_loaded(
    checkpoint: Path, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "load_model", lambda *_, **__: pytest.fail("loaded the model"))
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 0, "text": "A?"}\n{"question_id": 1, "image": "im0.png"}\n')
    with pytest.raises(BadSampleError, match=r"q\.jsonl:2: the row has no 'text'"):
        main(flags(checkpoint, path, image_folder, tmp_path / "a.jsonl"))
    path.write_text('{"question_id": 0, "text": "A?"}\n')
    with pytest.raises(FlagError, match="--conv-mode v9"):
        main(flags(checkpoint, path, image_folder, tmp_path / "a.jsonl", **{"conv-mode": "v9"}))
    assert not (tmp_path / "a.jsonl").exists()


def test_long_answers_are_the_same_program(
    checkpoint: Path, question_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    """`model_vqa` writes the same file; only its limit on an answer is another."""
    files = [
        program_main(flags(checkpoint, question_file, image_folder, tmp_path / f"{name}.jsonl"))
        for name, program_main in (("loader", main), ("vqa", model_vqa.main))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    limits = [module.build_parser().parse_args([]).max_new_tokens for module in (model_vqa_loader, model_vqa)]
    assert limits == [128, 1024]


FLAGS = json.loads((golden_dir("llava") / "flags.json").read_text())["cli"]
SPARSE = json.loads((golden_dir("dynamic") / "table_eval_options.json").read_text())
EVALUATION = [
    *(f"llava/eval/model_vqa{name}.py" for name in ("", "_loader", "_science", "_mmbench")),
    *(f"llava/eval/eval_{name}.py" for name in ("pope", "science_qa", "textvqa")),
    *(f"scripts/convert_{name}_for_submission.py" for name in ("mmbench", "seed", "vizwiz", "vqav2")),
    *(f"scripts/convert_{name}_for_eval.py" for name in ("gqa", "mmvet")),
    "llava/serve/cli.py",
    "llava/eval/model_qa.py",
    *(f"llava/eval/eval_science_qa_gpt4{name}.py" for name in ("", "_requery")),
    *(f"llava/eval/eval_gpt_review{name}.py" for name in ("", "_visual", "_bench")),
]
SPARSE_EVALUATION = [
    *(f"llava/dynamic_eval/model_vqa{name}.py" for name in ("", "_loader", "_science")),
    *(f"llava/dynamic_eval/eval_{name}.py" for name in ("pope", "science_qa", "textvqa")),
    "llava/dynamic_eval/run_dynamic_llava.py",
]


def parser_of(script: str) -> argparse.ArgumentParser:
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).build_parser()


@pytest.mark.parametrize("script", SPARSE_EVALUATION)
def test_programs_for_sparse_models_have_the_original_options(script: str) -> None:
    actions = {flag: action for action in parser_of(script)._actions for flag in action.option_strings}
    assert SPARSE[script]
    for option in SPARSE[script]:
        assert option["flag"] in actions
        if "default" in option:
            assert actions[option["flag"]].default == option["default"]


@pytest.mark.parametrize("script", EVALUATION)
def test_every_option_of_the_original_is_there(script: str) -> None:
    """With its default, but for the device (ours is the GPU if there is one) and for images, which may be several."""
    golden = FLAGS[script]
    parser = parser_of(script)
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    for option in golden:
        for flag in option["flags"]:
            if option["dest"] not in ("device", "image_file"):
                assert actions[flag].default == option["default"], flag
            assert actions[flag].dest == option["dest"]
            assert actions[flag].help, "every option explains itself"


def test_the_program_is_thin() -> None:
    """What later programs share lives in `program.py` and `runner.py`; a program maps rows to tasks."""
    own = [
        name for name, value in vars(model_vqa_loader).items() if getattr(value, "__module__", "") == main.__module__
    ]
    assert sorted(own) == ["build_parser", "main", "make_task"]


def test_a_language_model_answers_questions_without_an_image(
    question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the original's flags, on a folder that is no LLaVA: what transformers' own model says."""
    monkeypatch.undo()  # the model of the other tests is a LLaVA
    base = golden_dir("llava") / "tiny-vicuna"
    rows = [json.loads(line) for line in question_file.read_text().splitlines()]
    texts_only = [row | {"category": "generic"} for row in rows if "image" not in row]
    questions = tmp_path / "texts.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in texts_only))
    files = ["--model-name", str(base), "--question-file", str(questions), "--answers-file", str(tmp_path / "a.jsonl")]
    path = model_qa.main([*files, "--device", "cpu", "--temperature", "0", "--max_new_tokens", "5"])
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(answers) == 2
    assert answers[0].keys() >= {"question_id", "text", "answer_id", "model_id", "metadata"}

    tokenizer, model = load_tokenizer(base), AutoModelForCausalLM.from_pretrained(base)
    for row, answer in zip(texts_only, answers, strict=True):
        conversation = conv_templates["vicuna_v1"].copy()
        conversation.append_message(conversation.roles[0], row["text"])
        conversation.append_message(conversation.roles[1], None)
        ids = torch.tensor([tokenizer(conversation.get_prompt()).input_ids])
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(expected, skip_special_tokens=True)
        assert answer["text"] == text.split(conversation.sep2)[0].strip()

    with pytest.raises(BadSampleError, match=r"questions\.jsonl:1: the row has an image.*model_vqa"):
        model_qa.main(["--model-name", str(base), "--question-file", str(question_file)])


def one_question(checkpoint: Path, image_file: str, **changes: Any) -> types.SimpleNamespace:
    """The attributes that callers of the original function pass, and no others."""
    values = {"model_path": str(checkpoint), "model_base": None, "model_name": "x", "query": QUERY, "conv_mode": None}
    values |= {"image_file": image_file, "sep": ",", "temperature": 0, "top_p": None, "num_beams": 1}
    return types.SimpleNamespace(**values | {"max_new_tokens": 6} | changes)


def test_one_question_prints_the_answer_of_the_batch_program(
    checkpoint: Path, question_file: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = main(flags(checkpoint, question_file, image_folder, tmp_path / "a.jsonl", **{"conv-mode": "llava_v1"}))
    capsys.readouterr()
    answer = run_llava.eval_model(one_question(checkpoint, str(image_folder / "im1.png")))
    assert capsys.readouterr().out == f"{answer}\n"
    assert answer == texts(path)[1]
    argv = ["--model-path", str(checkpoint), "--image-file", str(image_folder / "im1.png"), "--query", QUERY]
    assert run_llava.main([*argv, "--temperature", "0", "--max_new_tokens", "6", "--device", "cpu"]) == answer


def test_one_question_on_two_images(
    checkpoint: Path, question_file: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = main(flags(checkpoint, question_file, image_folder, tmp_path / "a.jsonl", **{"conv-mode": "llava_v1"}))
    names = [str(image_folder / name) for name in ("im2.png", "im4.png")]
    asked = one_question(checkpoint, ";".join(names), query="Compare.", sep=";")
    assert run_llava.eval_model(asked) == texts(path)[5]
    asked.query = "<image-placeholder>\n<image-placeholder>\nCompare."
    assert run_llava.eval_model(asked) == texts(path)[5]
    asked.query = "Compare <image-placeholder>."
    with pytest.raises(BadSampleError, match="1 '<image-placeholder>' in the question, but 2 image"):
        run_llava.eval_model(asked)
    asked.image_file = names[0]
    assert run_llava.eval_model(asked) != texts(path)[5]


def test_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert choose_device(None) == device
    assert choose_device("mps") == "mps"
    with pytest.raises(FlagError, match="--device cuda:1: torch finds no CUDA device"):
        choose_device("cuda:1")
    names = [
        str(choose_dtype(name, device)) for name, device in [("auto", "cpu"), ("auto", "cuda"), ("bfloat16", "cpu")]
    ]
    assert names == ["torch.float32", "torch.float16", "torch.bfloat16"]
    with pytest.raises(FlagError, match="--torch-dtype int8"):
        choose_dtype("int8", "cpu")
