"""Labels of conversations: images, borders, lengths, malformed turns (golden ones: `test_golden_labels.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.labels import TokenizedPrompt, tokenize_conversation
from llava.data.templates import select_template
from llava.errors import BadSampleError
from llava.runtime.tokenizer import load_tokenizer
from tests.llava.runtime.tokenizers import make_tokenizer


def targets(prompt: TokenizedPrompt, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Runs of targets as text, a dummy prefix included."""
    runs = [""]
    for label in prompt.labels.tolist():
        if label != IGNORE_INDEX:
            runs[-1] += tokenizer.convert_ids_to_tokens(label)
        elif runs[-1]:
            runs.append("")
    return [run for run in runs if run]


def conversation(*texts: str, speakers: Sequence[str] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": speakers[turn % len(speakers)], "value": text} for turn, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


def test_images_of_a_sample_with_several_stay_where_they_stand(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = conversation("<image> and <image>: which is darker?", "The first.")
    prompt = tokenize_conversation(turns, tokenizer, select_template("v1"), image_count=2)
    assert "USER: <image> and <image>: which is darker? ASSISTANT:" in prompt.prompt
    assert prompt.input_ids.tolist().count(IMAGE_TOKEN_INDEX) == 2
    with pytest.raises(BadSampleError, match=r"2 <image> in the text but 3 image\(s\)"):
        tokenize_conversation(turns, tokenizer, select_template("v1"), image_count=3)


def test_an_image_in_an_answer_is_no_target(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = conversation("Draw a cat.", "Here: <image>")
    prompt = tokenize_conversation(turns, tokenizer, select_template("v1"), image_count=1)
    position = prompt.input_ids.tolist().index(IMAGE_TOKEN_INDEX)
    assert prompt.labels[position] == IGNORE_INDEX
    assert prompt.labels[position + 1] != IGNORE_INDEX


def test_a_token_across_the_border_of_an_answer_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = conversation("Hi", "Hello", "Bye", "Good night")
    with pytest.raises(BadSampleError, match=r"token '\|><\|' lies across the border .*Hello<\|im_end\|>"):
        tokenize_conversation(turns, tokenizer, select_template("mpt"), image_count=0)
    prompt = tokenize_conversation(turns, make_tokenizer(chat_tokens=True), select_template("mpt"), image_count=0)
    assert targets(prompt, make_tokenizer(chat_tokens=True)) == ["Hello<|im_end|>", "Good▁night<|im_end|>"]


@pytest.mark.parametrize(
    ("max_length", "patches", "fits"),
    [(None, 1, True), (52, 1, True), (48, 1, False), (120, 64, True), (110, 64, False)],
)
def test_a_target_must_lie_within_the_length(
    max_length: int | None, patches: int, fits: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns = conversation("<image>\nWhat?", "A bus.")

    def run() -> TokenizedPrompt:
        return tokenize_conversation(
            turns, tokenizer, select_template("v1"), image_count=1, max_length=max_length, patches_per_image=patches
        )

    if fits:
        assert run().labels[-1] != IGNORE_INDEX, "a sample with image is not cut here"
        return
    with pytest.raises(BadSampleError, match=f"is cut at {max_length} .*--model_max_length"):
        run()


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no answer"),
        (["Hi"], "turn 0 is not"),
        ([{"from": "human"}], "turn 0 is not"),
        ([{"from": "human", "value": None}], "turn 0 is not"),
        (conversation("Hi", "Yo", speakers=("user", "assistant")), "turn 0 is from 'user'; speakers are human and gpt"),
        (conversation("Hi", "Hello?", "Yo", speakers=("human", "human", "gpt")), "turn 1 is from 'human' but 'gpt'"),
        (conversation("Hi", "\ud83d"), "turn 1 holds half a surrogate pair"),
        (conversation("Hi", ""), "no answer to train on.*USER: Hi ASSISTANT:"),
    ],
)
def test_malformed_turns(turns: list, message: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadSampleError, match=message):
        tokenize_conversation(turns, tokenizer, select_template("v1"), image_count=0)


def test_a_fast_tokenizer_gives_the_same_targets(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "</s>"}).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    prompt = tokenize_conversation(
        conversation("<image>\nWhat?", "A café."), tokenizer, select_template("v1"), image_count=1
    )
    labels = prompt.labels[prompt.labels != IGNORE_INDEX].tolist()
    expected = tokenizer(" A café.</s>", add_special_tokens=False).input_ids
    assert len(expected) == len(" A café.".encode()) + 1, "one token per byte, so a character may have several"
    assert labels == expected


V0_TURNS = conversation("Hi", "Hello", "Bye", "Good night")


def test_the_v0_family_trains_the_separator_that_ends_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tokenize_conversation(V0_TURNS, tokenizer, select_template("llava_v0"), image_count=0)
    assert prompt.prompt.endswith(
        "questions.\n\n### Human: Hi\n### Assistant: Hello\n### Human: Bye\n### Assistant: Good night\n### "
    )
    assert targets(prompt, tokenizer) == ["\u2581Hello<0x0A>###", "\u2581Good\u2581night<0x0A>###"]


def test_the_example_of_the_default_template_is_not_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [
        tokenize_conversation(V0_TURNS, tokenizer, select_template(name), image_count=0)
        for name in ("default", "llava_v0")
    ]
    assert "renewable" not in prompts[0].prompt
    assert prompts[0].labels.tolist() == prompts[1].labels.tolist()


@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "mistral_instruct", "chatml_direct", "llava_v0"])
def test_several_images_in_several_turns(version: str) -> None:
    tokenizer = make_tokenizer(chat_tokens=True)
    turns = conversation("<image> or <image>?", "The first.", "And <image>?", "No.", "Sure?", "Yes.")
    prompt = tokenize_conversation(turns, tokenizer, select_template(version), image_count=3)
    ids = prompt.input_ids.tolist()
    assert ids.count(IMAGE_TOKEN_INDEX) == 3
    answers = [run.replace("\u2581", " ").strip().partition(".")[0] for run in targets(prompt, tokenizer)]
    assert answers == ["The first", "No", "Yes"]
    assert all(label == IGNORE_INDEX for index, label in zip(ids, prompt.labels.tolist(), strict=True) if index < 0)
