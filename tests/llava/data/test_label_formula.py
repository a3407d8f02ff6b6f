"""Ids, labels and covered characters of all templates and kinds of tokenizers, against a formula without short cuts."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, Piece, SeparatorStyle, conv_templates
from llava.data.labels import tokenize_conversation
from llava.data.templates import select_template
from llava.data.turns import place_image, training_pieces
from llava.errors import TokenBorderError
from llava.runtime.tokenizer import added_token_pattern, encode_covered, starts_with_bos
from tests.golden import golden_dir
from tests.llava.data.test_labels import conversation
from tests.llava.runtime.tokenizers import make_tokenizer

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = (
    ("What is\nit?", "A café, 3 \U0001f600s.\n\nAnd  more: 你好", " and then? ", "</s> is not </ s>", "So?", "Yes"),
    ("Hello", "<b>Hi</b>", "", "", "\t", "end \n"),
)


def byte_level(bos: bool) -> PreTrainedTokenizerBase:
    """Like those of Llama 3 and Qwen: one token per byte, and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate([*names, *alphabet])}, merges=[]))
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    slow = {
        "slow": make_tokenizer(chat_tokens=True),
        "slow, legacy": make_tokenizer(legacy=True, chat_tokens=True),
        "slow, no <s>": make_tokenizer(add_bos=False, chat_tokens=True, im_tokens=True),
    }
    for each in slow.values():
        each.chat_template = CHAT
    metaspace = AutoTokenizer.from_pretrained(golden_dir("llava") / "tiny-vicuna", local_files_only=True)
    metaspace.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    metaspace.chat_template = CHAT
    assert metaspace.is_fast
    return slow | {"fast": byte_level(True), "fast, no <s>": byte_level(False), "fast, Llama": metaspace}


def plain(
    turns: list[dict[str, str]], tokenizer: Any, template: Conversation, images: int, wrapped: bool
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Ids, labels and spans, each text by a call of its own and each character looked at by itself.

    Raises:
        TokenBorderError: as ours.
    """
    texts = [turn["value"] for turn in turns]
    if images:
        texts = [place_image(text, images, template, wrapped) for text in texts]
    pieces = training_pieces([turn["from"] for turn in turns], texts, template)
    ids, spans, start = [], [], 0
    if not template.writes_bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        ids, spans = [tokenizer.bos_token_id], [(0, 0)]
    prompt = "".join(piece.text for piece in pieces)
    for number, part in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN) if images else [prompt]):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
            spans.append((start, start + len(DEFAULT_IMAGE_TOKEN)))
            start += len(DEFAULT_IMAGE_TOKEN)
        ids += tokenizer(part, add_special_tokens=False).input_ids
        if tokenizer.is_fast:
            covered = tokenizer(part, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
        else:
            covered = [span for _, span in tokenizer.token_spans(part)]
        spans += [(start + first, start + last) for first, last in covered]
        start += len(part)
    return ids, plain_labels(ids, spans, pieces), spans


def plain_labels(ids: list[int], spans: list[tuple[int, int]], pieces: list[Piece]) -> list[int]:
    trained = [piece.trained for piece in pieces for _ in piece.text]
    labels = []
    for index, (first, last) in zip(ids, spans, strict=True):
        kinds = set(trained[first : max(last, first + 1)])
        if len(kinds) == 2:
            raise TokenBorderError("")
        labels.append(index if kinds == {True} and index != IMAGE_TOKEN_INDEX else IGNORE_INDEX)
    return labels


def rows(template: Conversation) -> list[tuple[list[dict[str, str]], int]]:
    """Turns and their number of images."""
    first, second = TEXTS
    if template.sep_style is SeparatorStyle.PLAIN:
        return [(conversation("<image>\nwords", text), 1) for text in (*first, *second) if text]
    one = conversation(f"<image>\n{first[0]}", *first[1:])
    several = conversation(f"<image> or <image>? {first[0]}", first[1], f"{first[2]} <image>", *first[3:])
    return [(conversation(*first), 0), (conversation(*second), 0), (one, 1), (several, 3), (one[:2], 1)]


@pytest.mark.parametrize("version", [*conv_templates, "tokenizer"])
def test_all_templates_and_tokenizers(version: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    targets = refused = 0
    for name, tokenizer in tokenizers.items():
        template = select_template(version, tokenizer)
        for (turns, images), wrapped in itertools.product(rows(template), (False, True)):
            options: dict[str, Any] = {"image_count": images, "mm_use_im_start_end": wrapped}
            try:
                ids, labels, spans = plain(turns, tokenizer, template, images, wrapped)
            except TokenBorderError:
                refused += 1
                with pytest.raises(TokenBorderError):
                    tokenize_conversation(turns, tokenizer, template, **options)
                continue
            found = tokenize_conversation(turns, tokenizer, template, **options)
            assert found.input_ids.tolist() == ids, (name, turns)
            assert found.labels.tolist() == labels, (name, turns)
            assert found.spans == spans, (name, turns)
            assert str(found.input_ids.dtype) == str(found.labels.dtype) == "torch.int64"
            targets += sum(label != IGNORE_INDEX for label in labels)
    assert targets > 300
    assert refused < 12


def test_a_piece_that_ends_elsewhere_has_other_labels() -> None:
    """What the comparison above must be able to see."""
    tokenizer = byte_level(True)
    pieces = [Piece("ab", False, 0), Piece("cd", True, 1)]
    moved = [Piece("a", False, 0), Piece("bcd", True, 1)]
    [covered] = encode_covered(tokenizer, ["abcd"])
    assert plain_labels(*covered, pieces) != plain_labels(*covered, moved)


@pytest.mark.parametrize(("name", "calls"), [("fast", 1), ("fast, Llama", 1), ("slow", 0)])
def test_one_call_for_all_texts_of_a_sample(
    name: str, calls: int, tokenizers: dict[str, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers[name]
    made = counted(tokenizer, "_encode_plus", monkeypatch)
    pieces = [] if tokenizer.is_fast else counted(tokenizer.sp_model, "encode", monkeypatch)
    turns = conversation("<image> or <image>?", "This.", "And <image>?", "No.")
    tokenize_conversation(turns, tokenizer, select_template("v1"), image_count=3)
    assert len(made) == calls
    # Four texts around three images; the last one is cut at two `</s>`.
    assert len(pieces) == (0 if tokenizer.is_fast else 5)


def counted(host: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A list that grows by the arguments of each call of a method."""
    calls: list[tuple] = []
    original = getattr(host, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(host, name, noted)
    return calls


@pytest.mark.parametrize("name", ["slow", "slow, no <s>", "fast", "fast, no <s>", "fast, Llama"])
def test_whether_a_text_begins_with_s(name: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers[name]
    assert starts_with_bos(tokenizer) == (tokenizer("").input_ids[:1] == [tokenizer.bos_token_id])
    assert starts_with_bos(tokenizer) == ("no <s>" not in name)


def test_padding_of_the_backend_is_no_token_of_the_text() -> None:
    tokenizer = byte_level(False)
    tokenizer.backend_tokenizer.enable_padding(**{"pad_id": 0, "pad_token": "<s>", "length": 4})
    assert not starts_with_bos(tokenizer)


@pytest.mark.parametrize(
    ("tokens", "overlap"),
    [
        (("<s>", "</s>", "<unk>"), False),
        (("<a>", "<a>b", "<a>bc", "<", "x<"), True),
        (("ab", "bc"), True),
        (("<im", "<im_start>", "[s]", "[s].*"), False),
    ],
)
def test_texts_are_cut_as_the_trie_cuts_them(tokens: tuple[str, ...], overlap: bool) -> None:
    tokenizer = make_tokenizer()
    trie = type(tokenizer.tokens_trie)()
    for token in tokens:
        trie.add(token)
    pattern = added_token_pattern(tokens)
    assert (pattern is None) == overlap
    if pattern is None:
        return
    generator = random.Random(0)
    parts = [*tokens, *"".join(tokens), " ", "a"]
    for _ in range(300):
        text = "".join(generator.choices(parts, k=generator.randint(0, 12)))
        assert list(filter(None, pattern.split(text))) == list(filter(None, trie.split(text))), text


def test_a_token_added_later_is_cut_out(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    from llava.runtime.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tmp_path)
    before = tokenizer.encode_covered("a <x> b").ids
    tokenizer.add_tokens(["<x>"])
    after = tokenizer.encode_covered("a <x> b")
    assert after.ids == tokenizer("a <x> b", add_special_tokens=False).input_ids != before
    assert after.spans[after.ids.index(len(tokenizer) - 1)] == (2, 5)
