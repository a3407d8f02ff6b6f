"""Image tokens, stop words and model names."""

from __future__ import annotations

import pytest
import torch

from llava.eval.answering.generation import KeywordsStoppingCriteria
from llava.eval.answering.prompts import tokenizer_image_token
from llava.runtime.hub import get_model_name_from_path
from tests.golden import load_case
from tests.llava.runtime.tokenizers import make_tokenizer

IMAGE_TOKEN_CASE, _ = load_case("llava", "tokenizer_image_token")
STOPPING_CASE, _ = load_case("llava", "keyword_stopping")


@pytest.mark.parametrize("case", IMAGE_TOKEN_CASE["cases"], ids=lambda case: f"{case['variant']}-{case['text']!r}")
def test_tokenizer_image_token(case: dict) -> None:
    tokenizer = make_tokenizer(**IMAGE_TOKEN_CASE["variants"][case["variant"]])
    index = {} if case["image_token_index"] is None else {"image_token_index": case["image_token_index"]}
    assert tokenizer_image_token(case["text"], tokenizer, **index) == case["ids"]
    tensor = tokenizer_image_token(case["text"], tokenizer, **index, return_tensors="pt")
    assert tensor.dtype == torch.long
    assert tensor.tolist() == case["ids"]


def test_other_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="return_tensors is 'np'"):
        tokenizer_image_token("", make_tokenizer(), return_tensors="np")


@pytest.mark.parametrize("case", STOPPING_CASE["cases"])
def test_keyword_stopping(case: dict) -> None:
    tokenizer = make_tokenizer(**STOPPING_CASE["variants"][case["variant"]])
    criteria = KeywordsStoppingCriteria(case["keywords"], tokenizer, torch.tensor(case["prompt_ids"]))
    assert [ids.tolist() for ids in criteria.keyword_ids] == case["keyword_ids"]
    assert criteria.max_keyword_len == case["max_keyword_len"]
    output = torch.tensor(case["output_ids"])
    stops = criteria(output)
    assert stops.shape == output.shape[:1]
    assert bool(stops.all()) == case["stop"]


def test_generation_from_embeddings_passes_only_new_ids() -> None:
    tokenizer = make_tokenizer()
    prompt = torch.tensor([tokenizer("A long prompt about a bus").input_ids])
    criteria = KeywordsStoppingCriteria(["bus"], tokenizer, prompt)
    answer = tokenizer("a bus", add_special_tokens=False, return_tensors="pt").input_ids
    assert criteria(answer).tolist() == [True]
    assert criteria(torch.cat([prompt, answer], dim=1)).tolist() == [True]
    assert criteria(prompt[:, :0]).tolist() == [False]
    assert criteria(prompt).tolist() == [False], "a keyword in the prompt does not count"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("./checkpoints/llava-lora/", "llava-lora"),
        ("checkpoints/llava-lora/checkpoint-300", "llava-lora_checkpoint-300"),
    ],
)
def test_model_name(path: str, name: str) -> None:
    assert get_model_name_from_path(path) == name
