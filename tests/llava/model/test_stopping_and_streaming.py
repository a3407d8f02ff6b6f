"""Generation from embeddings with transformers' own tools: no cache, stop strings, streamers, left padding."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer, TextStreamer

from llava.eval.answering.generation import KeywordsStoppingCriteria
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.runtime.cache_name import cache_of
from tests.golden import golden_dir, load_case

pytestmark = pytest.mark.versions

LLAVA = golden_dir("llava")
CASE, TENSORS = load_case("llava", "arch_generate")
NEW = 10


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, LlavaLlamaForCausalLM]:
    tokenizer, model, _, _ = load_pretrained_model(str(LLAVA / "tiny-llava-v1.5"), device="cpu")
    return tokenizer, model


@pytest.fixture
def model(loaded: tuple[Any, LlavaLlamaForCausalLM]) -> LlavaLlamaForCausalLM:
    return loaded[1]


@pytest.fixture
def tokenizer(loaded: tuple[Any, LlavaLlamaForCausalLM]) -> Any:
    return loaded[0]


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Rows with one image, two images and none, padded on the left."""
    rows = [TENSORS[f"in/{name}/input_ids"][0] for name in ("one_image", "two_images", "text_only")]
    longest = max(map(len, rows))
    return {
        "inputs": torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows]),
        "attention_mask": torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long(),
        "images": TENSORS["in/pool"][:4],
    }


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of the batch without its padding."""
    start = (0, 1, 3)[row]
    images = batch["images"][start : start + (1, 2, 1)[row]]
    return {"inputs": batch["inputs"][row][batch["attention_mask"][row].bool()][None], "images": images}


@pytest.fixture
def passes(model: LlavaLlamaForCausalLM) -> Iterator[list[tuple[int, bool]]]:
    """Length and use of a cache of every pass through the decoder."""
    seen: list[tuple[int, bool]] = []

    def note(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((output.last_hidden_state.shape[1], cache_of(output) is not None))

    handle = model.model.register_forward_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


OPTIONS = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_cache_nothing_is_cached_and_the_answer_is_the_same(
    options: dict[str, Any], model: LlavaLlamaForCausalLM, batch: dict[str, Tensor], passes: list[tuple[int, bool]]
) -> None:
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(model.generate(**batch, use_cache=use_cache, max_new_tokens=NEW, min_new_tokens=NEW, **options))
        lengths, cached = zip(*passes, strict=True)
        passes.clear()
        assert len(lengths) == NEW
        steps = [1] * (NEW - 1) if use_cache else [lengths[0] + step for step in range(1, NEW)]
        assert list(lengths[1:]) == steps
        assert set(cached) == {use_cache}
    assert torch.equal(*results)


def test_a_generation_config_without_cache_counts(
    model: LlavaLlamaForCausalLM, batch: dict[str, Tensor], passes: list[tuple[int, bool]]
) -> None:
    config = GenerationConfig(use_cache=False, max_new_tokens=3, eos_token_id=2, pad_token_id=0)
    tokens = model.generate(**batch, generation_config=config)
    assert not any(cached for _, cached in passes)
    assert config.use_cache is False
    assert torch.equal(tokens, model.generate(**batch, max_new_tokens=3))


def test_padding_does_not_change_an_answer(model: LlavaLlamaForCausalLM, batch: dict[str, Tensor]) -> None:
    together = model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=False)
    for row, result in enumerate(together):
        single = model.generate(**alone(batch, row), max_new_tokens=NEW, min_new_tokens=NEW, use_cache=False)
        assert torch.equal(single[0], result)


def new_words(tokenizer: Any, tokens: Tensor) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


@pytest.fixture
def stop_case(model: LlavaLlamaForCausalLM, tokenizer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, str, list[int]]:
    """Free answers, a string that ends rows at different steps, and for each row the number of tokens up to it."""
    free = model.generate(**batch, max_new_tokens=NEW, pad_token_id=0)
    lengths = [int((row != 0).sum()) for row in free]
    for row in free:
        for start in range(1, NEW - 2):
            string = tokenizer.decode(row[start : start + 2], skip_special_tokens=True).strip()
            ends = [
                next((n for n in range(1, length) if string in tokenizer.decode(answer[:n])), length)
                for answer, length in zip(free, lengths, strict=True)
            ]
            if string and "\ufffd" not in string and len(set(ends)) > 1 and ends != lengths:
                return free, string, ends
    raise AssertionError("no string tells the rows apart; choose another prompt")


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("tool", ["stop_strings", "keywords"])
def test_stop_strings_end_each_row_by_itself(
    tool: str,
    use_cache: bool,
    model: LlavaLlamaForCausalLM,
    tokenizer: Any,
    batch: dict[str, Tensor],
    stop_case: tuple[Tensor, str, list[int]],
) -> None:
    free, string, ends = stop_case
    if tool == "keywords":
        criteria = KeywordsStoppingCriteria([string], tokenizer, batch["inputs"])
        stop: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([criteria])}
    else:
        stop = {"stop_strings": [string], "tokenizer": tokenizer}
    options = {"max_new_tokens": NEW, "pad_token_id": 0, "use_cache": use_cache}
    tokens = model.generate(**batch, **options, **stop)
    assert tokens.shape[1] == max(ends)
    for row, (answer, end) in enumerate(zip(tokens, ends, strict=True)):
        assert torch.equal(answer[:end], free[row, :end])
        assert set(answer[end:].tolist()) <= {0}, "a row that has stopped is padded"
    assert not torch.equal(model.generate(**batch, **options)[:, : tokens.shape[1]], tokens), "without it they go on"


def test_text_streamer_prints_the_answer_alone(
    model: LlavaLlamaForCausalLM, tokenizer: Any, batch: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    for skip_prompt in (True, False):
        streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        tokens = model.generate(**alone(batch, 0), max_new_tokens=NEW, streamer=streamer)
        assert capsys.readouterr().out.rstrip("\n") == new_words(tokenizer, tokens)[0].rstrip("\n")


def test_text_iterator_streamer_gives_pieces_as_they_come(
    model: LlavaLlamaForCausalLM, tokenizer: Any, batch: dict[str, Tensor]
) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=alone(batch, 0) | options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    tokens = model.generate(**alone(batch, 0), max_new_tokens=30, min_new_tokens=30)
    assert "".join(pieces) == new_words(tokenizer, tokens)[0]
    assert len([piece for piece in pieces if piece]) > 1
