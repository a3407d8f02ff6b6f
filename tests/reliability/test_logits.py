"""Logits that are not numbers are no answer, in no mode of generation and in no program; other rows get theirs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.dynamic_eval import model_lvis_for_meteor, model_lvis_for_ppl
from llava.errors import NotFiniteError
from llava.eval import long_answers, model_vqa_loader, run_llava
from llava.eval.answering import question_run as program
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel, load_model
from llava.eval.answering.questions import read_questions
from llava.eval.answering.runner import UnansweredError, answer_batch, make_prompt
from llava.eval.answering.stepwise import Stepper
from llava.eval.lmms.likelihood import likelihoods, make_candidate
from llava.eval.lmms.model import BatchedModel
from llava.eval.model_vqa_loader import make_task
from llava.runtime.finite_logits import LogitsWatch, are_sound, no_answer
from llava.serve import cli
from llava.serve.chat import Chat
from llava.serve.engine import Engine, Job, Row
from llava.serve.problems import EngineError
from mma.lavin import answering, demo
from mma.lavin import eval as mma_eval
from mma.lavin.chat import LavinChat
from mma.lavin.page import Handlers
from tests.dynamic.sparse_checkpoint import write_sparse_checkpoint
from tests.golden import golden_dir
from tests.llava.eval.conftest import QUESTIONS
from tests.mma.lavin.lavin_files import LavinFiles, save_lavin_files, train_tiny
from tests.reliability.overflowing import FACTOR, overflowing_llava, poisoned

INF, NAN = float("inf"), float("nan")
IMAGES = golden_dir("llava") / "data" / "images"
BAD = 1
"""Question that holds a word of no other question; no image."""

DTYPE = r"float16.*--torch-dtype bfloat16"
TEXTS = [row for row in QUESTIONS if "image" not in row] + [{"question_id": 9, "text": "How many dogs are there?"}]
"""Questions without images; the last one is the bad one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that overflows in float16, and not in float32."""
    return overflowing_llava(tmp_path_factory.mktemp("overflowing") / "llava-tiny")


@pytest.fixture(scope="module", params=["llava", "sparse"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A sound model in float16: a plain one, and one that drops tokens."""
    if request.param == "llava":
        return load_model(str(golden_dir("llava") / "tiny-llava-v1.5"), device="cpu", torch_dtype="float16")
    path = write_sparse_checkpoint(tmp_path_factory.mktemp("sparse"))
    return load_model(str(path), device="cpu", torch_dtype="float16")


@pytest.fixture(scope="module")
def lavin(tmp_path_factory: pytest.TempPathFactory) -> tuple[LavinFiles, Path]:
    """Files of a tiny LaVIN, and a checkpoint trained on them."""
    files = save_lavin_files(tmp_path_factory.mktemp("lavin"))
    return files, train_tiny(files, tmp_path_factory.mktemp("trained") / "lavin")


def own_tokens(loaded: LoadedModel, text: str, others: list[str]) -> set[int]:
    """Tokens that a text alone has."""

    def ids(part: str) -> set[int]:
        return set(loaded.tokenizer(part, add_special_tokens=False).input_ids)

    found = ids(text) - set().union(*(ids(other) for other in others), ids("A chat between USER: ASSISTANT: the"))
    assert found
    return found


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture
def bad_word(loaded: LoadedModel) -> Iterator[None]:
    """Question `BAD` gives logits that are not numbers, and no other one."""
    others = [row["text"] for row in QUESTIONS if row["question_id"] != BAD]
    with poisoned(loaded, own_tokens(loaded, QUESTIONS[BAD]["text"], others)):
        yield


LOGITS = {
    "numbers": ([1.0, -2.0, 3.0], True),
    "suppressed tokens": ([1.0, -INF, -INF], True),
    "large": ([3e38, -3e38, 0.0], True),
    "one NaN": ([1.0, NAN, 3.0], False),
    "NaN alone": ([NAN, NAN, NAN], False),
    "NaN among suppressed tokens": ([-INF, NAN, -INF], False),
    "infinite": ([1.0, INF, 3.0], False),
    "infinite both ways": ([-INF, INF, 0.0], False),
    "all suppressed": ([-INF, -INF, -INF], False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("values", "sound"), LOGITS.values(), ids=LOGITS)
def test_what_is_a_number(values: list[float], sound: bool, dtype: torch.dtype) -> None:
    rows = torch.tensor([values, [0.0, 1.0, 2.0]], dtype=torch.float64).clamp(
        *(torch.finfo(dtype).min, torch.finfo(dtype).max) if "3e+38" in str(values) else (-INF, INF)
    )
    assert are_sound(rows.to(dtype)).tolist() == [sound, True]


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams and sampling": {"do_sample": True, "num_beams": 2},
    "without a cache": {"do_sample": False, "use_cache": False},
    "invalid values removed": {"do_sample": False, "remove_invalid_values": True},
    "a dict": {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
}


def prompts(bad: int) -> Tensor:
    """Three prompts; the token 301 is in the second one alone, if it is bad."""
    ids = torch.randint(310, 600, (3, 8), generator=torch.Generator().manual_seed(0))
    ids[1, 3] = bad
    return ids


@pytest.mark.parametrize("arguments", MODES.values(), ids=MODES)
def test_every_mode_names_the_row(loaded: LoadedModel, arguments: dict[str, Any]) -> None:
    """One bad row of three; in modes without chance, the others are what they are without it."""
    arguments = arguments | {"max_new_tokens": 6}
    if arguments.get("num_beams", 1) > 1 and loaded.model.extensions.configs:
        arguments["num_beams"] = 1
    sound = loaded.model.generate(prompts(301), **arguments)
    with poisoned(loaded, [301]):
        with pytest.raises(NotFiniteError, match=rf"row\(s\) \[1\] of 3.*{DTYPE}") as raised:
            loaded.model.generate(prompts(301), **arguments)
        loaded.model.generate(prompts(302), **arguments)  # negative control: no bad row, no error
    assert raised.value.rows == (1,)
    if arguments["do_sample"]:
        return
    ids = sound if isinstance(sound, Tensor) else sound.sequences
    width = min(ids.shape[1], raised.value.output.shape[1])
    for row in (0, 2):
        assert raised.value.output[row, :width].tolist() == ids[row, :width].tolist()


def test_a_bad_row_costs_no_steps(loaded: LoadedModel) -> None:
    """A batch of bad rows ends at once instead of after `max_new_tokens`."""
    with poisoned(loaded, [301]), pytest.raises(NotFiniteError) as raised:
        loaded.model.generate(prompts(301)[1:2], max_new_tokens=64, do_sample=False)
    assert raised.value.output.shape[1] == 1


def test_what_comes_behind_the_end_of_a_row_does_not_count() -> None:
    watch = LogitsWatch()
    watch.begin(rows=2, ends=[2])
    numbers, none = torch.zeros(2, 5), torch.tensor([[NAN] * 5, [0.0] * 5])
    watch(torch.empty(2, 0, dtype=torch.long), numbers)
    watch(torch.tensor([[2], [4]]), none)  # row 0 has ended
    assert watch.broken(9) == []
    watch(torch.tensor([[2, 0], [4, 4]]), none.flip(0))
    assert watch.broken(9) == [1]
    assert watch.broken(2) == [], "it broke in the third step"


def test_a_step_in_the_middle(loaded: LoadedModel) -> None:
    """The first tokens are numbers, and a later one is not: no part of an answer passes for an answer."""
    ids = prompts(302)[:1]
    sound = loaded.model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist()
    new = [place for place, token in enumerate(sound[:-1]) if token not in ids[0].tolist() + sound[:place]]
    assert new
    with poisoned(loaded, [sound[new[-1]]]), pytest.raises(NotFiniteError) as raised:
        loaded.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert raised.value.output.shape[1] == new[-1] + 2, "it ends at the first step without numbers"


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, "--torch-dtype bfloat16"),
        (torch.bfloat16, "--torch-dtype float32"),
        (torch.float32, "no other dtype will help"),
    ],
)
def test_the_message_says_what_to_do(dtype: torch.dtype, advice: str) -> None:
    text = no_answer("q.jsonl:3", dtype)
    assert text.startswith("q.jsonl:3: ")
    assert str(dtype).removeprefix("torch.") in text
    assert advice in text


DECODING = {
    "greedy": GenerationOptions(temperature=0, max_new_tokens=6),
    "sampling": GenerationOptions(temperature=0.8, top_p=0.9, max_new_tokens=6),
    "beams": GenerationOptions(temperature=0, num_beams=3, max_new_tokens=6),
}


def text_prompts(loaded: LoadedModel, tmp_path: Path) -> list[Any]:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    tasks = [make_task(question) for question in read_questions(path)]
    return [make_prompt(str(number), task, loaded, "vicuna_v1") for number, task in enumerate(tasks)]


@pytest.mark.parametrize("options", DECODING.values(), ids=DECODING)
def test_a_batch_is_answered_but_for_the_bad_question(
    loaded: LoadedModel, options: GenerationOptions, tmp_path: Path
) -> None:
    asked = text_prompts(loaded, tmp_path)
    if options.num_beams > 1 and loaded.model.extensions.configs:
        pytest.skip("the sparse model refuses beams")
    tokens = own_tokens(loaded, TEXTS[-1]["text"], [row["text"] for row in TEXTS[:-1]])
    sound = answer_batch(asked, [[]] * len(asked), loaded, options)
    with poisoned(loaded, tokens), pytest.raises(UnansweredError) as raised:
        answer_batch(asked, [[]] * len(asked), loaded, options)
    assert raised.value.answers == {key: text for key, text in sound.items() if key != asked[-1].key}
    message = str(raised.value)
    assert f"texts.jsonl:{len(TEXTS)}" in message
    assert "question_id 9" in message
    assert "texts.jsonl:1" not in message
    assert "--torch-dtype bfloat16" in message


def flags(path: Path, questions: Path, answers: Path, *more: str) -> list[str]:
    return [
        *("--model-path", str(path), "--question-file", str(questions), "--image-folder", str(IMAGES)),
        *("--answers-file", str(answers), "--conv-mode", "vicuna_v1", "--max_new_tokens", "6", "--device", "cpu"),
        *more,
    ]


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line)["question_id"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("size", ["1", "3", "7"])
def test_an_evaluation_writes_the_others_of_the_batch(
    size: str,
    loaded: LoadedModel,
    bad_word: None,
    question_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(program, "load_model", lambda *_, **__: loaded)
    target = tmp_path / "a.jsonl"
    words = flags(golden_dir("llava"), question_file, target, "--batch-size", size, "--temperature", "0")
    with pytest.raises(UnansweredError, match=rf"questions\.jsonl:{BAD + 1} \(question_id {BAD}\): .*{DTYPE}"):
        model_vqa_loader.main(words)
    assert BAD not in rows_of(target)
    if size == "7":
        assert sorted(rows_of(target)) == [row["question_id"] for row in QUESTIONS if row["question_id"] != BAD]


@pytest.mark.parametrize("temperature", ["0", "0.7"])
@pytest.mark.parametrize("beams", ["1", "2"])
def test_the_program_on_a_model_that_overflows(
    temperature: str, beams: str, folder: Path, question_file: Path, tmp_path: Path
) -> None:
    """No row is written in float16; in float32 the same command answers."""
    target = tmp_path / "a.jsonl"
    words = flags(folder, question_file, target, "--temperature", temperature, "--num_beams", beams)
    with pytest.raises(UnansweredError, match=DTYPE):
        model_vqa_loader.main([*words, "--torch-dtype", "float16"])
    assert rows_of(target) == []
    model_vqa_loader.main([*words, "--torch-dtype", "float32", "--restart"])
    assert rows_of(target) == [row["question_id"] for row in QUESTIONS]


def test_run_llava_names_the_query(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model-path", str(folder), "--image-file", str(IMAGES / "im0.png"), "--query", "What is shown?"]
    words += ["--conv-mode", "vicuna_v1", "--device", "cpu", "--max_new_tokens", "4", "--torch-dtype"]
    with pytest.raises(UnansweredError, match=rf"--query .*{DTYPE}"):
        run_llava.main([*words, "float16"])
    assert run_llava.main([*words, "float32"]) is not None


def test_likelihoods_name_the_question(loaded: LoadedModel, tmp_path: Path) -> None:
    asked = text_prompts(loaded, tmp_path)
    candidates = [make_candidate(prompt.key, prompt.task, "a lake", loaded, "vicuna_v1") for prompt in asked]
    assert len(likelihoods(candidates, [[]] * len(asked), loaded)) == len(asked)
    tokens = own_tokens(loaded, TEXTS[-1]["text"], [row["text"] for row in TEXTS[:-1]] + ["a lake"])
    with poisoned(loaded, tokens), pytest.raises(NotFiniteError, match=rf"texts\.jsonl:{len(TEXTS)} .*{DTYPE}"):
        likelihoods(candidates, [[]] * len(asked), loaded)


CONVERSATIONS = [
    {"id": "a", "conversations": [{"from": "human", "value": "What is a lake?"}, {"from": "gpt", "value": "Water."}]},
]


@pytest.mark.parametrize("metric", ["ppl", "meteor"])
def test_long_answers(metric: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_answers, "find_wordnet", lambda: None)
    monkeypatch.setattr(long_answers, "meteor", lambda *_: 0.5)
    source, target = tmp_path / "lvis.json", tmp_path / "a.jsonl"
    source.write_text(json.dumps(CONVERSATIONS))
    main = {"ppl": model_lvis_for_ppl, "meteor": model_lvis_for_meteor}[metric].main
    words = ["--model-path", str(folder), "--question-file", str(source), "--answers-file", str(target)]
    words += ["--conv-mode", "vicuna_v1", "--device", "cpu", "--restart", "--torch-dtype"]
    with pytest.raises(NotFiniteError, match=rf"lvis\.json.*{DTYPE}"):
        main([*words, "float16"])
    assert target.read_text() == ""
    main([*words, "float32"])
    assert len(target.read_text().splitlines()) == 1


def test_a_perplexity_that_is_no_number(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of finite size, and an answer that they make impossible."""
    stepper = Stepper(loaded, "row 5")
    stepper.logits = torch.tensor([0.0, -INF])
    with pytest.raises(NotFiniteError, match="row 5: the perplexity of the answer is inf"):
        stepper.score([1])


@pytest.fixture
def talk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[Chat, str]]:
    def run(dtype: str, *more: str) -> tuple[Chat, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is a lake?\n"))
        words = ["--model-path", str(folder), "--device", "cpu", "--max-new-tokens", "6", "--conv-mode", "vicuna_v1"]
        return cli.main([*words, "--torch-dtype", dtype, *more]), capsys.readouterr().out

    return run


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_the_terminal_says_so(temperature: str, talk: Callable[..., tuple[Chat, str]]) -> None:
    chat, said = talk("float16", "--temperature", temperature)
    assert "error: your message: " in said
    assert "--torch-dtype bfloat16" in said
    assert chat.conversation.messages == []  # the message can be said again
    chat, said = talk("float32", "--temperature", temperature)
    assert "error" not in said
    assert len(chat.conversation.messages) == 2


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_server_fails_that_request_alone(loaded: LoadedModel, temperature: float, tmp_path: Path) -> None:
    asked = text_prompts(loaded, tmp_path)
    options = GenerationOptions(temperature=temperature, max_new_tokens=6)

    def answers() -> dict[str, str | Exception]:
        engine, found = Engine(loaded, gather_seconds=0.5), {prompt.key: "" for prompt in asked}
        ends: dict[str, Any] = {}
        for prompt in asked:
            row = Row(
                Job(prompt.input_ids, (), options),
                lambda text, key=prompt.key: found.update({key: found[key] + text}),
                lambda reason, _, key=prompt.key: ends.update({key: reason}),
            )
            engine._waiting.put(row)
        engine.start()
        while len(ends) < len(asked):
            pass
        engine.close()
        assert engine.batches == [len(asked)], "all in one batch"
        return {key: ends[key] if isinstance(ends[key], Exception) else found[key] for key in found}

    sound = answers()
    assert all(isinstance(answer, str) for answer in sound.values())
    with poisoned(loaded, own_tokens(loaded, TEXTS[-1]["text"], [row["text"] for row in TEXTS[:-1]])):
        broken = answers()
    failed = broken.pop(asked[-1].key)
    assert isinstance(failed, EngineError)
    assert "this request: " in str(failed)
    assert "--torch-dtype bfloat16" in str(failed)
    assert broken == {key: answer for key, answer in sound.items() if key in broken}


def too_large(loaded: LoadedModel) -> LoadedModel:
    """The same model with an MLP that overflows in float16."""
    mlp = loaded.model.get_model().layers[0].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear.weight.mul_(FACTOR)
    return loaded


def lavin_words(files: LavinFiles, checkpoint: Path, output: Path, dtype: str) -> list[str]:
    return [
        *("--ckpt_dir", str(files.weights), "--adapter_path", str(checkpoint), "--data_root", str(files.data)),
        *("--split", "train", "--max_seq_len", "512", "--max_batch_size", "4", "--device", "cpu"),
        *("--output_dir", str(output), "--max_new_tokens", "4", "--torch-dtype", dtype, "--limit", "4"),
    ]


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_lavin(temperature: str, lavin: tuple[LavinFiles, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """`mma.eval` on a model that overflows: nothing is written or scored in float16, and everything in float32."""
    load = answering.load_lavin
    monkeypatch.setattr(answering, "load_lavin", lambda *arguments: too_large(load(*arguments)))
    words = lavin_words(*lavin, tmp_path / "half", "float16")
    with pytest.raises(UnansweredError, match=DTYPE):
        mma_eval.main([*words, "--generation_temperature", temperature])
    assert (tmp_path / "half" / "answers.jsonl").read_text() == ""
    assert not (tmp_path / "half" / "scores.json").exists()
    words = lavin_words(*lavin, tmp_path / "whole", "float32")
    mma_eval.main([*words, "--generation_temperature", temperature])
    assert len((tmp_path / "whole" / "answers.jsonl").read_text().splitlines()) == 4


def test_lavins_page_shows_the_error(lavin: tuple[LavinFiles, Path], tmp_path: Path) -> None:
    files, checkpoint = lavin
    folders = answering.Folders(files.weights / "7B-hf", checkpoint)
    for dtype in ("float16", "float32"):
        words = ["--ckpt_dir", str(files.weights), "--adapter_path", str(checkpoint), "--device", "cpu"]
        words += ["--max_seq_len", "512", "--torch-dtype", dtype]
        args, given = demo.build_parser().parse_args(words), answering.given_options(demo.build_parser(), words)
        engine = Engine(too_large(answering.load_lavin(args, given, folders, "cpu")))
        engine.start()
        with closing(engine):
            shown = list(Handlers(LavinChat(engine), tmp_path, 64).ask("What is a lake?", [], None, 0.0, 0.75, 4, 0))[
                -1
            ][-1]
        failed = "--torch-dtype bfloat16" in str(shown)
        assert failed == (dtype == "float16")


def test_lmms_eval_is_told_of_its_own_option(folder: Path) -> None:
    instance = SimpleNamespace(args=("What is a lake?", {"max_new_tokens": 4}, lambda _: [], 0, "task", "test"))
    model = BatchedModel(str(folder), device="cpu", dtype="float16")
    model.task_dict = {"task": {"test": [{}]}}
    with pytest.raises(UnansweredError, match=r"task/test:0 .*float16.*dtype=bfloat16 in --model_args"):
        model.generate_until([instance])
    model = BatchedModel(str(folder), device="cpu", dtype="float32")
    model.task_dict = {"task": {"test": [{}]}}
    assert len(model.generate_until([instance])) == 1
