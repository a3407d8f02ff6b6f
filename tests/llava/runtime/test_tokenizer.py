"""Token ids, decoded text and character spans of the Llama tokenizer against the golden cases."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AddedToken, PreTrainedTokenizerBase

from llava.errors import CheckpointError
from llava.runtime.tokenizer import LlamaTokenizer, load_tokenizer
from tests.golden import golden_dir, load_case
from tests.llava.runtime.tokenizers import make_tokenizer

CASE, _ = load_case("llava", "tokenizer")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {name: make_tokenizer(**variant) for name, variant in CASE["variants"].items()}


def test_the_case_list_is_complete() -> None:
    assert len(CASE["cases"]) == 120


@pytest.mark.parametrize("case", CASE["cases"], ids=lambda case: f"{case['variant']}-{case['text'][:20]!r}")
def test_ids_and_decoding(case: dict, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers[case["variant"]]
    assert tokenizer(case["text"]).input_ids == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decode"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"]
    assert tokenizer.batch_decode([case["ids"]], skip_special_tokens=True) == [case["batch_decode_skip"]]


@pytest.mark.parametrize("case", CASE["cases"], ids=lambda case: f"{case['variant']}-{case['text'][:20]!r}")
def test_spans_cover_the_text_once_and_spell_it(case: dict, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer, text = tokenizers[case["variant"]], case["text"]
    spans = tokenizer.token_spans(text)
    assert [span.start for _, span in spans] == [0, *(span.end for _, span in spans)][: len(spans)]
    assert "".join(text[span.start : span.end] for _, span in spans) == text
    for token, span in spans:
        covered = text[span.start : span.end].replace(" ", "\u2581")
        if not token.startswith("<0x") and covered:
            assert token in (covered, "\u2581" + covered), "a token covers its own characters, plus a dummy prefix"


def test_special_ids(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers["im_tokens"]
    for name, index in CASE["special"].items():
        assert getattr(tokenizer, f"{name}_token_id") == index
    assert tokenizer.get_added_vocab() == CASE["added_ids"]
    assert tokenizers["default"].vocab_size == len(tokenizers["default"]) == CASE["vocab_size"]
    assert len(tokenizer) == CASE["vocab_size"] + 3


@pytest.mark.parametrize("variant", CASE["variants"])
def test_saving_and_loading_gives_the_same_tokenizer(
    variant: str, tokenizers: dict[str, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    tokenizers[variant].save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for case in CASE["cases"]:
        if case["variant"] == variant:
            assert loaded(case["text"]).input_ids == case["ids"]


def test_legacy_and_corrected_form_differ(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    text = "yes</s>USER: hi"
    assert tokenizers["default"](text).input_ids != tokenizers["legacy"](text).input_ids


def test_padding_and_length_options() -> None:
    tokenizer = load_tokenizer(golden_dir("llava") / "tiny-vicuna", model_max_length=5, padding_side="left")
    rows = tokenizer(["a", "a b c d e f"], padding=True, truncation=True).input_ids
    assert [len(row) for row in rows] == [5, 5]
    assert rows[0][:3] == [tokenizer.pad_token_id] * 3


def test_a_missing_pad_token_becomes_unk() -> None:
    tokenizer = load_tokenizer(golden_dir("tokenizer"), pad_token=None)
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_added_tokens_that_remove_blanks_are_refused() -> None:
    model = str(golden_dir("tokenizer") / "tokenizer.model")
    with pytest.raises(CheckpointError, match="'<x>' has lstrip"):
        LlamaTokenizer(model, added_tokens_decoder={896: AddedToken("<x>", lstrip=True)})
