"""Token ids and labels of conversations against the golden ones, and where ours differ on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates, select_template
from llava.data.labels import TokenizedPrompt, place_image, tokenize_conversation
from llava.errors import BadSampleError, FlagError
from llava.tokenizer import load_tokenizer
from tests.data.tokenizers import make_tokenizer
from tests.golden import load_case

CASE, _ = load_case("llava", "preprocess")
SAMPLES = CASE["samples"]

TRAINABLE = (SeparatorStyle.TWO, SeparatorStyle.PLAIN)

MISMATCH = {
    "eos_in_answer": ["▁One▁tag▁is▁</s>▁and▁it▁ends▁a▁text.</s>"],
    "sep_in_question": ["▁So▁you▁did.</s>"],
    "ends_with_human": ["▁Hello</s>"],
    "three_image": ["▁There▁are▁3▁dogs.</s>", "▁Only▁2,▁near▁the▁door.</s>", "▁Yes.</s>"],
}
"""Samples whose lengths the original miscounts, so that it trains on nothing and prints a warning, with our targets.

`three_image` is one of them only for a tokenizer without `<s>`.
"""

UNTRAINABLE = {
    ("empty_answer", "v1"): "no answer to train on",
    ("image_second_turn", "v1"): r"2 <image> in the text but 1 image\(s\)",
    ("literal_image_text_only", "plain"): r"1 <image> in the text but 0 image\(s\)",
}
"""Samples that the original keeps and we refuse, by template family: nothing is trained on, or images do not fit."""


def family(case: dict) -> str:
    """`plain` or `v1`, the branch that a golden case of the trainable templates takes."""
    return "plain" if case["version"].endswith("plain") else "v1"


def trainable_cases() -> list[dict]:
    """Golden cases of the templates that are trained with at present.

    An unknown `--version` is an error here, see `test_conversation.py`.
    """
    cases = []
    for case in CASE["cases"]:
        template = conv_templates.get(case["version"])
        if case["version"] in ("v0", "v0.5") or (template and template.sep_style in TRAINABLE):
            cases.append(case)
    return cases


CASES = trainable_cases()


def tokenizer_of(case: dict) -> PreTrainedTokenizerBase:
    return make_tokenizer(
        legacy=case["legacy"],
        add_bos=case["add_bos"],
        chat_tokens=case["chat_tokens"],
        im_tokens=SAMPLES[case["sample"]].get("im_tokens", False),
    )


def tokenize(case: dict, row: int = 0) -> TokenizedPrompt:
    sample = SAMPLES[case["sample"]]
    return tokenize_conversation(
        sample["sources"][row],
        tokenizer_of(case),
        select_template(case["version"]),
        image_count=int(sample["image"]),
        mm_use_im_start_end=sample.get("im_tokens", False),
        max_length=sample.get("model_max_length", 512),
    )


def targets(prompt: TokenizedPrompt, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Runs of targets as text, a dummy prefix included."""
    runs = [""]
    for label in prompt.labels.tolist():
        if label != IGNORE_INDEX:
            runs[-1] += tokenizer.convert_ids_to_tokens(label)
        elif runs[-1]:
            runs.append("")
    return [run for run in runs if run]


def name_of(case: dict) -> str:
    suffix = "-legacy" * case["legacy"] + "-no_bos" * (not case["add_bos"])
    return f"{case['version']}-{case['sample']}{suffix}"


def test_the_case_list_is_complete() -> None:
    assert len(CASES) == 93


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ids_and_labels(case: dict) -> None:
    refusal = UNTRAINABLE.get((case["sample"], family(case)))
    if "error" in case or refusal:
        with pytest.raises(BadSampleError, match=refusal):
            tokenize(case)
        return
    for row in range(len(SAMPLES[case["sample"]]["sources"])):
        prompt = tokenize(case, row)
        length = len(prompt.input_ids)
        golden_ids, golden_labels = case["input_ids"][row], case["labels"][row]
        assert prompt.input_ids.tolist() == golden_ids[:length]
        assert set(golden_ids[length:]) <= {0}, "the rest is the padding of a batch"
        if "tokenization mismatch" in case["stdout"]:
            assert set(golden_labels) == {IGNORE_INDEX}
            expected = [
                text.replace("</s>▁and", "</s>▁▁and") if case["legacy"] else text for text in MISMATCH[case["sample"]]
            ]
            assert targets(prompt, tokenizer_of(case)) == expected
        else:
            assert prompt.labels.tolist() == golden_labels[:length]


@pytest.mark.parametrize(("key", "reason"), UNTRAINABLE.items(), ids=str)
def test_every_listed_difference_occurs(key: tuple[str, str], reason: str) -> None:
    assert any((case["sample"], family(case)) == key and "error" not in case for case in CASES)


def test_every_listed_mismatch_occurs() -> None:
    assert {case["sample"] for case in CASES if "mismatch" in case["stdout"]} == {*MISMATCH, "empty_answer"}


OTHER_FAMILIES = [
    case
    for case in CASE["cases"]
    if case["version"] in ("llama_2", "llava_llama_2", "mistral_instruct")
    and "error" not in case
    and not case["stdout"]
]


@pytest.mark.parametrize("case", OTHER_FAMILIES, ids=name_of)
def test_llama_2_templates(case: dict) -> None:
    if case["sample"] in ("image_second_turn", "long_text", "long_image"):  # images do not fit, or cut too early
        with pytest.raises(BadSampleError):
            tokenize(case)
        return
    for row in range(len(case["labels"])):
        prompt = tokenize(case, row)
        assert prompt.input_ids.tolist() == case["input_ids"][row][: len(prompt.input_ids)]
        assert prompt.labels.tolist() == case["labels"][row][: len(prompt.labels)]


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


def test_one_image_goes_in_front_of_its_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    for case in CASE["cases"]:
        if "after_multimodal" in case and case["version"] in conv_templates:
            sample = SAMPLES[case["sample"]]
            for turns, expected in zip(sample["sources"], case["after_multimodal"], strict=True):
                template, im_tokens = select_template(case["version"]), sample.get("im_tokens", False)
                assert [place_image(turn["value"], 1, template, im_tokens) for turn in turns] == expected


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


def test_inference_templates_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(FlagError, match="Vicuna v0 family are for inference"):
        tokenize_conversation(conversation("Hi", "Yo"), tokenizer, select_template("llava_v0"), image_count=0)


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
