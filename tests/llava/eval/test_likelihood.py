"""The probability of a given answer: that of the model itself, for answers of any length in one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.data.images import ProcessedImage, load_image
from llava.data.labels import tokenize_conversation
from llava.errors import BadSampleError
from llava.eval.answering.answers import Task
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.prompts import build_prompt, tokenizer_image_token
from llava.eval.answering.runner import generate_batch, image_arguments, load_images, make_prompt
from llava.eval.lmms.likelihood import Candidate, Likelihood, likelihoods, make_candidate
from tests.golden import golden_dir
from tests.llava.eval.conftest import QUESTIONS

CHOICES = (["A", "B", "a large lake"], ["a dog", "two dogs and a lake", "No"], ["the sky", "red"])
"""Of one token and of several, so that batches hold answers of different lengths."""

TOLERANCE = 1e-4
"""Measured in fp32: at most 9.1e-6 between batches and single rows, of log-likelihoods from -5 to -44."""


def choices() -> list[tuple[int, str]]:
    """Number of the question and text of each choice, question by question."""
    return [(number, choice) for number in range(len(QUESTIONS)) for choice in CHOICES[number % len(CHOICES)]]


def task_of(number: int) -> Task:
    row = QUESTIONS[number]
    names = row.get("image", [])
    return Task(number, row["text"], row["text"], (names,) if isinstance(names, str) else tuple(names), "q.jsonl:1")


def images_of(loaded: LoadedModel, number: int) -> list[ProcessedImage]:
    folder = golden_dir("llava") / "data" / "images"
    return load_images(task_of(number), loaded, lambda image, where: load_image(folder, image, row=where))


def inputs(loaded: LoadedModel, number: int, choice: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Prompt (1, T), choice (1, N) and image arguments; the choice as vicuna_v1 writes it."""
    task = task_of(number)
    prompt = make_prompt("0", task, loaded, "vicuna_v1").input_ids[None]
    message = "<image>\n" * len(task.images) + task.question
    whole = tokenizer_image_token(f"{build_prompt(message, 'vicuna_v1')} {choice}", loaded.tokenizer)
    assert whole[: prompt.shape[1]] == prompt[0].tolist()
    return prompt, torch.tensor([whole[prompt.shape[1] :]]), image_arguments([images_of(loaded, number)], loaded)


def in_one_pass(loaded: LoadedModel, prompt: Tensor, answer: Tensor, images: dict[str, Any]) -> Likelihood:
    """From one forward pass over prompt and answer."""
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.cat([prompt, answer], dim=1), **images).logits
    return likelihood(logits[0, -answer.shape[1] - 1 : -1], answer[0])


def by_generating(loaded: LoadedModel, prompt: Tensor, answer: Tensor, images: dict[str, Any]) -> Likelihood:
    """From the logits of a `generate` that is allowed one token at every step; tokens are dropped as in any answer."""
    made = loaded.model.generate(
        prompt,
        **images,
        do_sample=False,
        max_new_tokens=answer.shape[1],
        prefix_allowed_tokens_fn=lambda _, ids: [answer[0, len(ids)].item()],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return likelihood(torch.cat(made.logits), answer[0])


def likelihood(logits: Tensor, answer: Tensor) -> Likelihood:
    """Of `answer` (N,) under `logits` (N, V)."""
    logs = logits.log_softmax(-1).gather(1, answer[:, None])
    return Likelihood(logs.sum().item(), bool((logits.argmax(-1) == answer).all()))


REFERENCES = {"llava": in_one_pass, "sparse": by_generating}


def reference(loaded: LoadedModel, name: str) -> list[Likelihood]:
    """Of every choice, one by one."""
    return [REFERENCES[name](loaded, *inputs(loaded, number, choice)) for number, choice in choices()]


def in_a_batch(loaded: LoadedModel, *, turned: bool = False) -> list[Likelihood]:
    """Of every choice, all at once."""
    asked = [make_candidate("0", task_of(number), choice, loaded, "vicuna_v1") for number, choice in choices()]
    images = [images_of(loaded, number) for number, _ in choices()]
    if turned:
        images = [[ProcessedImage(one.pixels.flip(-1) + 1, one.size) for one in row] for row in images]
    return likelihoods(asked, images, loaded)


@pytest.mark.parametrize("name", REFERENCES)
def test_likelihoods_are_those_of_the_model(name: str, models: dict[str, LoadedModel]) -> None:
    expected, found = reference(models[name], name), in_a_batch(models[name])
    torch.testing.assert_close([one.log for one in found], [one.log for one in expected], rtol=0, atol=TOLERANCE)
    assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]
    if name != "llava":
        differences = [abs(a.log - b.log) for a, b in zip(found, in_a_batch(models["llava"]), strict=True)]
        assert max(differences) > 0.01, "the predictors must act"


def test_what_greedy_decoding_writes_is_greedy(loaded: LoadedModel) -> None:
    """And with another last token it is not."""
    prompts = [make_prompt(str(number), task_of(number), loaded, "vicuna_v1") for number in range(len(QUESTIONS))]
    images = [images_of(loaded, number) for number in range(len(QUESTIONS))]
    made = generate_batch(prompts, images, loaded, {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4})
    made = made[:, :3]
    asked = [Candidate(prompt, answer) for prompt, answer in zip(prompts, made, strict=True)]
    found = likelihoods(asked, images, loaded)
    assert all(one.is_greedy for one in found)
    made[:, -1] += 1
    others = likelihoods(asked, images, loaded)
    assert not any(one.is_greedy for one in others)
    assert all(other.log < one.log for one, other in zip(found, others, strict=True))


def test_every_choice_sees_its_own_image(loaded: LoadedModel) -> None:
    """Negative control: with other pixels, the choices of questions with an image change, and no others."""
    pairs = zip(in_a_batch(loaded), in_a_batch(loaded, turned=True), choices(), strict=True)
    for right, wrong, (number, choice) in pairs:
        assert (abs(right.log - wrong.log) > 1e-3) == ("image" in QUESTIONS[number]), choice


@pytest.mark.parametrize("conv_mode", ["vicuna_v1", "llava_v1", "llava_llama_2", "mpt", "chatml_direct"])
@pytest.mark.parametrize("blanks", ["", "  "])
def test_an_answer_is_written_as_in_training(conv_mode: str, blanks: str, loaded: LoadedModel) -> None:
    question, answer = QUESTIONS[2]["text"], "a large lake"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    trained = tokenize_conversation(turns, loaded.tokenizer, conv_templates[conv_mode].copy(), image_count=0)
    found = make_candidate("0", task_of(2), blanks + answer, loaded, conv_mode)
    start = int((trained.labels != IGNORE_INDEX).long().argmax())
    length = len(found.answer)
    assert found.prompt.input_ids.tolist() == trained.input_ids[:start].tolist()
    assert found.answer.tolist() == trained.labels[start : start + length].tolist()
    rest = trained.labels[start + length :]
    assert loaded.tokenizer.decode(rest[rest != IGNORE_INDEX]).strip() in ("</s>", "<|im_end|>")


@pytest.mark.parametrize("answer", ["", " ", "an <image>", "A</s>"])
def test_answers_that_have_no_probability(answer: str, loaded: LoadedModel) -> None:
    with pytest.raises(BadSampleError, match=r"q\.jsonl:1: "):
        make_candidate("0", task_of(0), answer, loaded, "vicuna_v1")
