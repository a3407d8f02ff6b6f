"""Token ids and labels of all golden conversations, and every place where our labels differ on purpose.

Ids are equal everywhere. Labels are equal wherever the original masks what it means to; elsewhere the trained text is
compared with one that is put together here from the answers and the separators alone.
"""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX
from llava.conversation import SeparatorStyle, conv_templates, default_conversation
from llava.data.labels import TokenizedPrompt, tokenize_conversation
from llava.data.templates import select_template
from llava.data.turns import place_image
from llava.errors import BadSampleError, FlagError
from tests.golden import load_case
from tests.llava.data.test_labels import targets
from tests.llava.runtime.tokenizers import make_tokenizer

CASE, _ = load_case("llava", "preprocess")
CASES, SAMPLES = CASE["cases"], CASE["samples"]

FAMILIES = {
    SeparatorStyle.SINGLE: "v0",
    SeparatorStyle.TWO: "v1",
    SeparatorStyle.MPT: "mpt",
    SeparatorStyle.LLAMA_2: "llama_2",
    SeparatorStyle.PLAIN: "plain",
}
TALKING = ("v0", "v1", "mpt", "llama_2")

REFUSED = {
    **{("empty_answer", family): "no answer to train on" for family in TALKING},
    **{("image_second_turn", family): r"2 <image> in the text but 1 image\(s\)" for family in TALKING},
    ("literal_image_text_only", "plain"): r"1 <image> in the text but 0 image\(s\)",
    ("system_speaker", "v0"): "speakers are human and gpt",
    ("long_text", "v0"): "is cut at 96",
    ("long_image", "v0"): "is cut at 96",
    ("long_text", "llama_2"): "is cut at 96",
    ("long_image", "llama_2"): "is cut at 96",
}
"""Samples that the original keeps and we refuse: no target, another image's place, or the speaker 'unknown'."""

CROSSING = ("three_image", "three_text", "two_text", "long_text", "ends_with_human")
"""Samples of several turns whose ChatML markers are no tokens of their own: `|><|` joins two turns. We refuse them."""

MISCOUNTED = {
    "eos_in_answer": ("v1", "llama_2"),
    "sep_in_question": ("v1", "llama_2"),
    "ends_with_human": ("v1", "llama_2"),
}
"""Samples whose tokens the original miscounts by their text ("tokenization mismatch"): it trains on nothing of them.

The same happens to nearly every ChatML conversation, and to several turns with a tokenizer without `<s>`.
"""

MISPLACED = {("long_image", "chatml_direct", False, False), ("two_text", "chatml_direct", True, True)}
"""(sample, version, legacy, chat tokens): ChatML masks that are off although the original's count agrees.

The first is longer than `model_max_length`, where nothing is compared; in the second two errors of one token cancel.
"""


def family(case: dict) -> str:
    """The branch of the original's preprocessing that a case takes; unknown versions fall back to the default one."""
    known = case["version"] in conv_templates and case["version"] != "v0"
    template = conv_templates[case["version"]] if known else default_conversation
    return FAMILIES[template.sep_style]


def crosses(case: dict) -> bool:
    return family(case) == "mpt" and not case["chat_tokens"] and case["sample"] in CROSSING


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


def trained_text(case: dict, row: int) -> list[str]:
    """What has to be trained on: each answer that is not empty, between what the template puts around it."""
    start, end = {
        "v0": ("\u2581", "<0x0A>###"),
        "v1": ("\u2581", "</s>"),
        "mpt": ("", "<|im_end|>"),
        "llama_2": ("\u2581", "\u2581</s>"),
        "plain": ("\u2581", "<0x0A>"),
    }[family(case)]
    turns = SAMPLES[case["sample"]]["sources"][row]
    if turns[0]["from"] == "gpt" and family(case) != "v0":
        turns = turns[1:]  # a greeting is left out; the v0 family keeps it
    return [f"{start}{spell(turn['value'], case)}{end}" for turn in turns if turn["from"] == "gpt" and turn["value"]]


def spell(text: str, case: dict) -> str:
    """A text as its SentencePiece tokens spell it."""
    for plain, pieces in (
        (" ", "\u2581"),
        ("\n", "<0x0A>"),
        ("\u00e9", "<0xC3><0xA9>"),
        ("\u6c49", "<0xE6><0xB1><0x89>"),
    ):
        text = text.replace(plain, pieces)
    # The legacy form puts a blank before a text that follows a special token.
    return text.replace("</s>\u2581", "</s>\u2581\u2581") if case["legacy"] else text


def name_of(case: dict) -> str:
    flags = ("legacy", "no_bos", "chat_tokens")
    values = (case["legacy"], not case["add_bos"], case["chat_tokens"])
    return "-".join(
        [case["version"], case["sample"], *(flag for flag, value in zip(flags, values, strict=True) if value)]
    )


def test_the_case_list_is_complete() -> None:
    assert len(CASES) == 254
    assert {case["version"] for case in CASES} >= set(conv_templates)
    assert {family(case) for case in CASES} == set(FAMILIES.values())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ids_and_labels(case: dict) -> None:
    if case["version"] == "no_such_version":
        with pytest.raises(FlagError, match="no conversation template of that name"):
            tokenize(case)
        return
    refusal = "lies across the border" if crosses(case) else REFUSED.get((case["sample"], family(case)))
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
        if differs(case):
            assert prompt.labels.tolist() != golden_labels[:length]
        else:
            assert prompt.labels.tolist() == golden_labels[:length]
        if case["sample"] != "long_text":  # that one is cut within its first answer
            assert targets(prompt, tokenizer_of(case)) == trained_text(case, row)


def differs(case: dict) -> bool:
    """True where the original's mask is not what it means to be."""
    if "tokenization mismatch" in case["stdout"]:
        assert all(set(labels) == {IGNORE_INDEX} for labels in case["labels"])
        miscounted = family(case) in MISCOUNTED.get(case["sample"], ())
        assert miscounted or family(case) == "mpt" or not case["add_bos"]
        return True
    misplaced = (case["sample"], case["version"], case["legacy"], case["chat_tokens"]) in MISPLACED
    # The v0 branch counts a further `<s>` for every turn, so each mask lies one position behind the one before.
    return family(case) == "v0" or (misplaced and case["add_bos"])


def test_a_v0_mask_of_the_original_trains_on_questions() -> None:
    """Shows that the difference is the original's: with each turn one more token of a question is a target."""
    case = next(case for case in CASES if name_of(case) == "llava_v0-three_text")
    pairs = zip(case["input_ids"][0], case["labels"][0], strict=True)
    text = "".join(tokenizer_of(case).convert_ids_to_tokens(index) if label >= 0 else "|" for index, label in pairs)
    assert "###\u2581Human" in text


@pytest.mark.parametrize(("key", "reason"), REFUSED.items(), ids=str)
def test_every_listed_refusal_occurs(key: tuple[str, str], reason: str) -> None:
    assert any((case["sample"], family(case)) == key and "error" not in case for case in CASES)


def test_every_listed_difference_occurs() -> None:
    assert {case["sample"] for case in CASES if crosses(case)} == set(CROSSING)
    for sample, families in MISCOUNTED.items():
        seen = {family(case) for case in CASES if case["sample"] == sample and "mismatch" in case.get("stdout", "")}
        assert set(families) <= seen
    keys = {(case["sample"], case["version"], case["legacy"], case["chat_tokens"]) for case in CASES}
    assert keys >= MISPLACED


def test_one_image_goes_in_front_of_its_turn() -> None:
    for case in CASE["cases"]:
        if "after_multimodal" in case and case["version"] in conv_templates:
            sample = SAMPLES[case["sample"]]
            for turns, expected in zip(sample["sources"], case["after_multimodal"], strict=True):
                template, im_tokens = select_template(case["version"]), sample.get("im_tokens", False)
                assert [place_image(turn["value"], 1, template, im_tokens) for turn in turns] == expected
