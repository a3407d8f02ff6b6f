"""Where an answer ends is decided for each row by itself: in batches of the server, in the terminal, in evaluation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from llava.errors import BadSampleError
from llava.eval.answering.answers import Task
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel, load_model
from llava.eval.answering.runner import answer_batch, make_prompt
from llava.eval.answering.stepwise import Stepper
from llava.eval.lmms.likelihood import Candidate, likelihoods, make_candidate
from llava.serve.chat import Chat, TokenQueue
from tests.llava.serve.test_api import CHECKPOINT, SETTINGS, ask, openai, running, uvicorn  # noqa: F401

pytestmark = pytest.mark.versions

MODE = "vicuna_v1"
LIMIT = 12
QUESTIONS = [f"Question {number}: what is {'shown ' * number}here?" for number in range(6)]


class Ends(NamedTuple):
    """A second token that ends answers, and how long each answer is up to and with it."""

    loaded: LoadedModel
    token: int
    lengths: list[int]
    free: list[list[int]]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(CHECKPOINT), device="cpu")


def free_ids(loaded: LoadedModel, question: str) -> list[int]:
    """Greedy tokens of an answer that only `</s>`, which is among them, or the limit ends."""
    prompt = make_prompt("0", Task(0, question, question, (), "q"), loaded, MODE)
    output: Tensor = loaded.model.generate(
        prompt.input_ids[None], max_new_tokens=LIMIT, do_sample=False, pad_token_id=0
    )
    return output[0].tolist()


@pytest.fixture
def ends(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Ends:
    """generation_config names a token besides `</s>` that ends some answers early and others not at all."""
    free = [free_ids(loaded, question) for question in QUESTIONS]
    for token in dict.fromkeys(token for ids in free for token in ids[1:6]):
        lengths = [ids.index(token) + 1 if token in ids else len(ids) for ids in free]
        if token not in (0, 1, 2) and min(lengths) < LIMIT // 2 and sum(length == LIMIT for length in lengths) >= 2:
            break
    else:
        raise AssertionError("no token tells the answers apart; choose other questions")
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [2, token])
    return Ends(loaded, token, lengths, free)


def text_of(ends: Ends, row: int) -> str:
    ids = ends.free[row][: ends.lengths[row]]
    return ends.loaded.tokenizer.decode([token for token in ids if token != ends.token], skip_special_tokens=True)


def test_reason_and_count_of_a_row_are_those_of_the_row_alone(ends: Ends) -> None:
    options = {"max_tokens": LIMIT, "temperature": 0.0}
    settings = replace(SETTINGS, defaults=replace(SETTINGS.defaults, token_limit=LIMIT))

    def one(question: str) -> tuple[str, str, int, int]:
        answer = ask(client, [{"role": "user", "content": question}], **options)
        choice, usage = answer.choices[0], answer.usage
        return choice.message.content, choice.finish_reason, usage.completion_tokens, usage.prompt_tokens

    with running(ends.loaded, settings, gather_seconds=0.0, max_batch=1) as (client, _):
        alone = [one(question) for question in QUESTIONS]
    with running(ends.loaded, settings, gather_seconds=2.0, max_batch=6) as (client, engine):
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(one, QUESTIONS))
        assert engine.batches == [6]
    assert together == alone
    last = [ids[length - 1] for ids, length in zip(ends.free, ends.lengths, strict=True)]
    reasons = ["stop" if token in (2, ends.token) else "length" for token in last]
    assert [(reason, count) for _, reason, count, _ in alone] == list(zip(reasons, ends.lengths, strict=True))
    assert [text for text, *_ in alone] == [text_of(ends, row).strip() for row in range(6)]
    assert {"stop", "length"} == set(reasons)


def test_the_terminal_and_evaluation_end_there_too(ends: Ends) -> None:
    wanted = [text_of(ends, row).strip() for row in range(6)]
    options = GenerationOptions(temperature=0, max_new_tokens=LIMIT)
    chat = Chat(ends.loaded, MODE, options, lambda *_: pytest.fail("no image"))
    said = []
    for question in QUESTIONS:
        chat.reset()
        said.append("".join(chat.ask(question)).strip())
    assert said == wanted
    prompts = [make_prompt(q, Task(q, q, q, (), "q"), ends.loaded, MODE) for q in QUESTIONS]
    assert list(answer_batch(prompts, [()] * 6, ends.loaded, options).values()) == wanted
    for prompt, ids, length in zip(prompts, ends.free, ends.lengths, strict=True):
        stepper = Stepper(ends.loaded, end=prompt.end)
        stepper.feed(prompt.input_ids)
        assert stepper.answer(LIMIT) == [token for token in ids[:length] if token not in (2, ends.token)]


def test_likelihood_takes_no_answer_with_an_end_in_it(ends: Ends) -> None:
    task = Task(0, "Hi", "Hi", (), "row 3")
    candidate = make_candidate("0", task, "a bus", ends.loaded, MODE)
    assert set(candidate.prompt.end.ids) == {2, ends.token}
    ids = torch.tensor([400, 401, 402])
    found = likelihoods([candidate, Candidate(candidate.prompt, ids)], [(), ()], ends.loaded)
    assert all(one.log < 0 for one in found)
    spelled = ends.loaded.tokenizer.decode([ends.token])
    if ends.loaded.tokenizer(f"a {spelled}", add_special_tokens=False).input_ids[-1] == ends.token:
        with pytest.raises(BadSampleError, match=r"row 3: the answer has .* which end a sequence"):
            make_candidate("0", task, f"a {spelled}", ends.loaded, MODE)


def test_a_text_ends_each_row_of_a_batch_by_itself(loaded: LoadedModel) -> None:
    """As where `</s>` is no token: the text is looked for and not shown, and other rows are as without it."""
    options = GenerationOptions(temperature=0, max_new_tokens=LIMIT)
    prompts = [make_prompt(q, Task(q, q, q, (), "q"), loaded, MODE) for q in QUESTIONS]
    free = answer_batch(prompts, [()] * 6, loaded, options)
    stop = next(
        text[start : start + 3]
        for text in free.values()
        for start in range(3, len(text) - 3)
        if text[start : start + 3].isalpha() and sum(text[start : start + 3] in other for other in free.values()) < 6
    )
    ended = [replace(prompt, end=replace(prompt.end, texts=(stop,))) for prompt in prompts]
    found = answer_batch(ended, [()] * 6, loaded, options)
    assert found == {key: text[: text.index(stop)].rstrip() if stop in text else text for key, text in free.items()}
    assert found != free


def test_an_end_that_is_no_special_token_is_not_shown(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer("a red bus", add_special_tokens=False).input_ids
    stream = TokenQueue(loaded.tokenizer, ends=[ids[-1]])
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(stream) == loaded.tokenizer.decode(ids[:-1])
