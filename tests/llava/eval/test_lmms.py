"""lmms-eval on local tasks with local images: its answers and choices are those of `llava.eval`.

`make test-lmms` runs these; without lmms-eval they are skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from torch import Tensor

from llava.data.images import load_image
from llava.errors import BadSampleError, FlagError
from llava.eval.answering.answers import AnswersFile, Task
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel, load_model
from llava.eval.answering.questions import read_questions
from llava.eval.answering.runner import answer_batch, answer_tasks, image_arguments, load_images, make_prompt
from llava.eval.lmms import model as lmms_model
from llava.eval.lmms.manifest import MODEL_ID
from llava.eval.lmms.model import own_device, read_batch_size
from llava.eval.lmms.requests import cut, generation_options
from llava.eval.model_vqa_loader import make_task
from tests.command_lines import ROOT
from tests.golden import golden_dir
from tests.llava.eval.conftest import QUESTIONS
from tests.llava.eval.test_likelihood import CHOICES, REFERENCES, TOLERANCE, choices, reference

needs_harness = pytest.mark.skipif(
    not lmms_model.is_installed(), reason="lmms-eval cannot be imported; `make test-lmms` has it"
)

GREEDY = {"max_new_tokens": 8, "do_sample": False, "until": []}
TASKS: dict[str, dict[str, Any]] = {
    "local_text": {"generation_kwargs": GREEDY},
    "local_beams": {"generation_kwargs": GREEDY | {"num_beams": 3}},
    "local_sampled": {"generation_kwargs": GREEDY | {"do_sample": True, "temperature": 1.0, "top_p": 0.9}},
    "local_choice": {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}]},
}
UTILS = """
from PIL import Image

def images(doc):
    return [Image.open(path) for path in doc["images"]]

def results(doc, results):
    return {"same": float(results[0] == doc["expected"])}
"""


@pytest.fixture(scope="module")
def expected(
    models: dict[str, LoadedModel], image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """Answers of `llava.eval` itself, one question at a time."""
    path = tmp_path_factory.mktemp("expected")
    (path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    tasks = [make_task(question) for question in read_questions(path / "q.jsonl")]

    def ask(name: str, **options: Any) -> list[str]:
        loaded = models[name]
        answers = AnswersFile(path / "a.jsonl", tasks, model_id=name, settings={}, restart=True)
        chosen = GenerationOptions(**{"temperature": 0.0, "max_new_tokens": 8} | options)
        answer_tasks(
            answers,
            loaded,
            lambda image, where: load_image(image_folder, image, row=where),
            chosen,
            conv_mode="vicuna_v1",
        )
        answers.finish()
        return [json.loads(line)["text"] for line in answers.path.read_text(encoding="utf-8").splitlines()]

    return ask


@pytest.fixture(scope="module")
def folder(expected: Callable[..., list[str]], image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks with their data, which name the images by their paths."""
    path = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, (question, answer) in enumerate(zip(QUESTIONS, expected("llava"), strict=True)):
        names = question.get("image", [])
        images = [str(image_folder / name) for name in ([names] if isinstance(names, str) else names)]
        choices = CHOICES[number % len(CHOICES)]
        rows.append({"text": question["text"], "images": images, "expected": answer, "choices": choices, "gold": 1})
    data = path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (path / "utils.py").write_text(UTILS, encoding="utf-8")
    source = {"dataset_path": "json", "test_split": "test", "doc_to_text": "text"}
    source["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(path / "cache")}
    for name, task in TASKS.items():
        settings = {"task": name, "doc_to_target": "gold"} | source | {"output_type": "generate_until"} | task
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())  # JSON is YAML
        text += "doc_to_visual: !function utils.images\n"
        if "metric_list" not in task:
            text += 'process_results: !function utils.results\nmetric_list: [{"metric": "same", "aggregation": "mean", '
            text += '"higher_is_better": true}]\n'
        (path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return path


def evaluate(folder: Path, pretrained: Path, *tasks: str, batch_size: int | str = 4, **options: Any) -> dict[str, Any]:
    """What lmms-eval finds; the rows of `samples` in the order of the questions."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name=MODEL_ID)
    return simple_evaluate(
        MODEL_ID,
        f"pretrained={pretrained},dtype=float32",
        tasks=list(tasks),
        task_manager=manager,
        batch_size=batch_size,
        device="cpu",
        **options,
    )


def answers(found: dict[str, Any], task: str) -> list[str]:
    return [row["filtered_resps"][0] for row in sorted(found["samples"][task], key=lambda row: row["doc_id"])]


@needs_harness
@pytest.mark.parametrize("name", ["llava", "sparse"])
@pytest.mark.parametrize("batch_size", [3, "auto"])
def test_answers_are_those_of_llava_eval(
    name: str, batch_size: int | str, folder: Path, checkpoints: dict[str, Path], expected: Callable[..., list[str]]
) -> None:
    found = evaluate(folder, checkpoints[name], "local_text", "local_beams", batch_size=batch_size)
    assert answers(found, "local_text") == expected(name)
    assert answers(found, "local_beams") == expected(name, num_beams=3)
    same = found["results"]["local_text"]["same,none"]
    if name == "llava":
        assert same == 1.0
    else:
        assert same < 1.0, "the predictors must act"


@needs_harness
@pytest.mark.parametrize("name", REFERENCES)
def test_choices_are_weighed_by_their_probability(
    name: str, folder: Path, checkpoints: dict[str, Path], models: dict[str, LoadedModel], tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    runs = [evaluate(folder, checkpoints[name], "local_choice", use_cache=cache) for _ in range(2)]
    rows = [sorted(run["samples"]["local_choice"], key=lambda row: row["doc_id"]) for run in runs]
    found = [[tuple(pair) for row in run for pair in row["filtered_resps"]] for run in rows]
    assert found[0] == found[1]
    losses, greedy = map(list, zip(*found[0], strict=True))
    expected = reference(models[name], name)
    torch.testing.assert_close(losses, [-one.log for one in expected], rtol=0, atol=TOLERANCE)
    assert greedy == [one.is_greedy for one in expected]
    right = []
    for number in range(len(QUESTIONS)):
        logs = [one.log for (of, _), one in zip(choices(), expected, strict=True) if of == number]
        right.append(logs.index(max(logs)) == 1)
    assert 0 < sum(right) < len(right), "a constant choice would show nothing"
    assert runs[0]["results"]["local_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))


@needs_harness
def test_lmms_eval_makes_text_of_a_bare_pair() -> None:
    """Why log-likelihoods travel in a `GenerationResult`; if this fails, lmms-eval has been mended."""
    from lmms_eval.api.instance import GenerationResult, unwrap_generation_output

    pair = lmms_model.Loss(1.5, True)
    assert unwrap_generation_output(GenerationResult(pair)) == (pair, None)
    assert unwrap_generation_output((1.5, True)) == ("(1.5, True)", None)


@needs_harness
def test_every_choice_sees_its_own_image(
    folder: Path, checkpoint: Path, models: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: with other pixels, the choices of questions with an image change, and no others."""

    def turned(*args: Any) -> dict[str, Any]:
        arguments = image_arguments(*args)
        return arguments | {"images": arguments["images"].flip(-1) + 1}

    monkeypatch.setattr("llava.eval.answering.runner.image_arguments", turned)
    rows = evaluate(folder, checkpoint, "local_choice", batch_size=30)["samples"]["local_choice"]
    monkeypatch.undo()
    losses = [pair[0] for row in sorted(rows, key=lambda row: row["doc_id"]) for pair in row["filtered_resps"]]
    for loss, right, (number, _) in zip(losses, reference(models["llava"], "llava"), choices(), strict=True):
        assert (abs(loss + right.log) > 1e-3) == ("image" in QUESTIONS[number])


@needs_harness
def test_sampling_does_not_depend_on_the_batch(
    folder: Path, checkpoint: Path, expected: Callable[..., list[str]]
) -> None:
    one, four = (answers(evaluate(folder, checkpoint, "local_sampled", batch_size=n), "local_sampled") for n in (1, 4))
    assert one == four
    assert one != expected("llava")


@needs_harness
@pytest.mark.slow
def test_the_command_line_with_two_processes(
    folder: Path, checkpoint: Path, expected: Callable[..., list[str]], tmp_path: Path
) -> None:
    """lmms-eval finds the model by the entry point, and the ranks share the questions."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval"]
    call += ["--model", MODEL_ID, "--model_args", f"pretrained={checkpoint},conv_template=vicuna_v1,dtype=float32"]
    call += ["--include_path", str(folder), "--tasks", "local_text,local_choice", "--batch_size", "2"]
    call += ["--log_samples", "--output_path", str(tmp_path), "--verbosity", "DEBUG"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Rank 1: loading datasets" in done.stdout
    (table,) = re.findall(r"^\|local_text .*$", done.stdout, re.MULTILINE)
    assert re.search(r"\|same\|\S* *\| *1\.000\|", table), table
    (path,) = tmp_path.rglob("*samples_local_text.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    assert [row["filtered_resps"] for row in rows] == expected("llava")
    (path,) = tmp_path.rglob("*_results.json")
    alone = evaluate(folder, checkpoint, "local_choice")["results"]["local_choice"]["acc,none"]
    assert json.loads(path.read_text(encoding="utf-8"))["results"]["local_choice"]["acc,none"] == alone


def instance(number: int, context: str, what: Any) -> Any:
    """A request as lmms-eval makes it, for a document that has its images in `shown`."""
    from lmms_eval.api.instance import Instance

    given = (context, what, lambda doc: doc["shown"], number, "t", "test")
    return Instance("generate_until", given, 0, {"task": "t", "doc_id": number, "repeats": 1})


@needs_harness
@pytest.mark.parametrize("options", [{}, {"load_4bit": True}], ids=["whole", "4 bits"])
def test_base_and_precision_reach_the_model(options: dict[str, Any], checkpoint: Path) -> None:
    """HydraLoRA's folder holds no base."""
    if options:
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    folder = str(golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle")
    model = lmms_model.model_class()(folder, str(checkpoint), device="cpu", **options)
    image = Image.new("RGB", (40, 30), "red")
    model.task_dict["t"] = {"test": [{"shown": [image]}]}
    loaded = load_model(folder, str(checkpoint), device="cpu", **options)
    task = Task("0", "What is it?", "What is it?", ("red",), "here")
    prompts = [make_prompt("0", task, loaded, "vicuna_v1")]
    images = [load_images(task, loaded, lambda name, where: image)]
    expected = answer_batch(prompts, images, loaded, GenerationOptions(temperature=0, max_new_tokens=8))
    assert model.generate_until([instance(0, task.question, GREEDY)]) == list(expected.values())
    kinds = [{type(module) for module in each.model.modules()} for each in (model.loaded, loaded)]
    assert kinds[0] == kinds[1]
    assert any(kind.__name__ == "Linear4bit" for kind in kinds[0]) == bool(options)


@needs_harness
def test_batches_shrink_when_memory_runs_out(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = lmms_model.model_class()(str(checkpoint), device="cpu", batch_size="auto", max_batch_size=6)
    model.task_dict["t"] = {"test": [{"shown": [Image.new("RGB", (8, 8), (number, 0, 0))]} for number in range(7)]}
    asked = [instance(number, f"What is number {number}?", GREEDY) for number in range(7)]
    choices = [instance(number, "Is it?", "Yes, it is") for number in range(7)]

    def losses() -> list[float]:
        return [one.text.loss for one in model.loglikelihood(choices)]

    roomy = model.generate_until(asked), losses()
    generate, sizes = model.loaded.model.generate, []

    def narrow(inputs: Tensor, **arguments: Any) -> Tensor:
        sizes.append(len(inputs))
        if len(inputs) > 3:
            raise torch.OutOfMemoryError("no room")
        return generate(inputs, **arguments)

    monkeypatch.setattr(model.loaded.model, "generate", narrow)
    assert model.generate_until(asked) == roomy[0]
    assert sizes == [6, 3, 3, 1]
    assert "out of memory: going on with batches of 3" in "".join(capfd.readouterr())
    torch.testing.assert_close(losses(), roomy[1], rtol=0, atol=TOLERANCE)
    model.batch_size = 4
    with pytest.raises(FlagError, match="--batch-size 4: the device ran out of memory"):
        model.generate_until(asked)


@needs_harness
def test_what_cannot_be_asked_names_the_document(checkpoint: Path) -> None:
    model = lmms_model.model_class()(str(checkpoint), device="cpu")
    model.task_dict["t"] = {"test": [{"shown": [Image.new("RGB", (8, 8))]}, {"shown": ["film.mp4"]}, {"shown": None}]}
    short = {"max_new_tokens": 2}
    places = [instance(0, "Look: <image> What is it?", short), instance(2, "And now?", short)]
    assert len(model.generate_until(places)) == 2
    with pytest.raises(BadSampleError, match=r"t/test:0: 2 .* but 1 image\(s\)"):
        model.generate_until([instance(0, "<image> or <image>?", short)])
    with pytest.raises(BadSampleError, match=r"t/test:1: the task shows \['str'\]"):
        model.generate_until([instance(1, "What happens?", short)])
    with pytest.raises(BadSampleError, match="t/test:2: '' is no answer"):
        model.loglikelihood([instance(2, "What?", " ")])
    with pytest.raises(BadSampleError, match="t/test:2: the answer has 2 tokens, 1 kinds"):
        model.loglikelihood([instance(2, "What?", " A</s>")])
    with pytest.raises(FlagError, match="answers in one round"):
        model.generate_until_multi_round([instance(2, "What?", {})])
    model.clean()
    assert not hasattr(model, "loaded")


def test_the_same_question_again_is_a_request_of_its_own() -> None:
    class Asked:
        args = ("What?", {}, None, 3, "t", "test")

    first, second = lmms_model.read_requests([Asked(), Asked()], {"t": {"test": []}})
    assert first.where == second.where == "t/test:3"
    assert first.key != second.key


@pytest.mark.parametrize(
    ("arguments", "options", "stops"),
    [
        ({}, {"temperature": 0.0, "max_new_tokens": 1024}, ()),
        ({"until": ["\n\n"], "do_sample": False}, {"temperature": 0.0, "max_new_tokens": 1024}, ()),
        (
            {"until": "ASSISTANT:", "temperature": 0, "top_p": 0},
            {"temperature": 0.0, "max_new_tokens": 1024},
            ("ASSISTANT:",),
        ),
        ({"until": ["Q:", "\n\n", ""], "max_gen_toks": 7}, {"temperature": 0.0, "max_new_tokens": 7}, ("Q:", "\n\n")),
        ({"temperature": 0.7, "do_sample": False}, {"temperature": 0.0, "max_new_tokens": 1024}, ()),
        ({"do_sample": True, "top_k": 50}, {"temperature": 1.0, "max_new_tokens": 1024, "seed": 5}, ()),
        (
            {"temperature": 0.2, "top_p": 0.9, "num_beams": 2, "max_new_tokens": 9, "seed": 1},
            {"temperature": 0.2, "top_p": 0.9, "num_beams": 2, "max_new_tokens": 9, "seed": 1},
            (),
        ),
        (
            {"image_aspect_ratio": "original", "repetition_penalty": 1.0},
            {"temperature": 0.0, "max_new_tokens": 1024},
            (),
        ),
    ],
)
def test_generation_arguments(arguments: dict[str, Any], options: dict[str, Any], stops: tuple[str, ...]) -> None:
    assert generation_options(arguments, "t/test:0", 5) == (GenerationOptions(**{"seed": 5} | options), stops)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repetition_penalty": 1.2}, "'repetition_penalty': 1.2"),
        ({"bad_words": []}, "bad_words"),
        ({"temperature": 1.0, "top_k": 1}, "top_k is 1"),
        ({"temperature": -1}, "--temperature -1.0: must be at least 0"),
        ({"until": 3}, "until is 3"),
    ],
)
def test_generation_arguments_that_are_not_carried_out(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FlagError, match=re.escape(message)) as error:
        generation_options(arguments, "t/test:0", 0)
    assert str(error.value).startswith("t/test:0: ")


def test_answers_are_cut_at_the_first_stop() -> None:
    assert cut("a dog\nQ: and", ("Q:", "\n")) == "a dog"
    assert cut("a dog", ("Q:",)) == "a dog"
    assert cut("a dog \n\nmore", ()) == "a dog \n\nmore"


def test_batch_sizes() -> None:
    assert [read_batch_size(value) for value in (1, "16", "auto", "auto:4")] == [1, 16, None, None]
    for value in (0, "many", "-1"):
        with pytest.raises(FlagError, match=f"--batch_size {value}: must be"):
            read_batch_size(value)


def test_every_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [own_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:1", "cuda:1"]
    with pytest.raises(FlagError, match="device=cuda:0 with 2 processes"):
        own_device("cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert own_device("cuda:0") == "cuda:0"


@needs_harness
def test_the_versions_that_are_tested_are_ones_that_the_extra_admits() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = [Requirement(line) for line in extras["lmms"]]
    assert [each.name for each in wanted] == ["lmms_eval", "filelock"]
    assert all(each.specifier.contains(version(each.name)) for each in wanted)
