"""Generation against the original's numbers: what training would say about the finished sequence, step by step.

The original rotates every token after the prefill by one position too few, so its own steps differ from its training;
with `shifted_decoding` ours does the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.runtime.cache_name import cache_of
from tests.mma.golden_model import IMAGE, golden_model

CASES = ["infer_attn", "infer_attn_same_len"]
FORWARD = {"rtol": 1e-4, "atol": 1e-4}


def prompt(case: dict, tokens: Tensor, row: int, length: int) -> Tensor:
    """The first `length` tokens of a finished sequence; the places of the image become one image token."""
    ids = tokens[row, :length].tolist()
    if not case["indicators"][row]:
        return torch.tensor(ids)
    start = 1 + len(case["prefix_img_ids"])
    count = case["config"]["vision"]["n_feats"]
    return torch.tensor([*ids[:start], IMAGE, *ids[start + count :]])


def batch_of(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows padded on the left, with their mask."""
    longest = max(map(len, rows))
    padded = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows])
    return {"input_ids": padded, "attention_mask": mask.long()}


@torch.no_grad()
def step_by_step(model: Any, case: dict, tensors: dict[str, Tensor]) -> Tensor:
    """Logits (steps, B, V) of the last position: the shortest prompt, then the finished sequence token by token."""
    tokens, first = tensors["out/tokens"], case["min_prompt_len"]
    batch = batch_of([prompt(case, tokens, row, first) for row in range(len(tokens))])
    out = model(**batch, images=tensors["in/images"], use_cache=True)
    logits, mask = [out.logits[:, -1]], torch.ones(len(tokens), out.logits.shape[1], dtype=torch.long)
    for index in range(first, tokens.shape[1] - 1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out = model(input_ids=tokens[:, index : index + 1], attention_mask=mask, cache=cache_of(out))
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.usefixtures("coupled")
@pytest.mark.parametrize("name", CASES)
def test_every_step_is_what_training_says(name: str, tmp_path: Path) -> None:
    model, case, tensors = golden_model(name, tmp_path)
    logits = step_by_step(model, case, tensors)
    torch.testing.assert_close(logits, tensors["out/train_graph_logits_at_steps"], **FORWARD)
    torch.testing.assert_close(logits[-1], tensors["out/prefill_all_but_last_logits"], **FORWARD)
    assert (logits - tensors["out/step_logits"]).abs().max() > 1, "the original's own steps are others"


@pytest.mark.usefixtures("coupled")
@pytest.mark.parametrize("name", CASES)
def test_shifted_decoding_gives_the_steps_of_the_original(name: str, tmp_path: Path) -> None:
    model, case, tensors = golden_model(name, tmp_path, shifted_decoding=True)
    logits = step_by_step(model, case, tensors)
    torch.testing.assert_close(logits, tensors["out/step_logits"], **FORWARD)


@pytest.mark.parametrize("name", CASES)
def test_prompts_alone(name: str, tmp_path: Path) -> None:
    """First logits of each prompt; with the original's positions its tokens too, in a batch as well."""
    model, case, tensors = golden_model(name, tmp_path, shifted_decoding=True)
    lengths = [len(ids) for ids in case["prompt_tokens"]]
    rows = [prompt(case, tensors["out/tokens"], row, length) for row, length in enumerate(lengths)]
    model.generation_config.eos_token_id = None  # the original never stops
    fixed = {"do_sample": False, "max_new_tokens": case["max_gen_len"]}
    together = model.generate(images=tensors["in/images"], **batch_of(rows), **fixed)
    for number, row in enumerate(rows):
        images = tensors["in/images"][number : number + 1]
        logits = model(input_ids=row[None], images=images).logits[0, -1]
        torch.testing.assert_close(logits, tensors[f"out/alone_{number}_first_logits"], **FORWARD)
        expected = tensors[f"out/alone_{number}_tokens"][lengths[number] :]
        assert torch.equal(model.generate(row[None], images=images, **fixed)[0], expected)
        assert torch.equal(together[number], expected)
