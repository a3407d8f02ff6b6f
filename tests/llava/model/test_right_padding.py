"""Rows padded on the right need no 4-D mask: none is made, and the numbers of real tokens are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava.constants import IGNORE_INDEX
from llava.model.language_model import masks
from llava.model.language_model.backbones import backbone_class, load_config
from llava.runtime.cache_name import cache_of
from tests.model import backbones

LENGTHS = (40, 23, 7)
LONGEST = max(LENGTHS)


class Masks(TorchDispatchMode):
    """Counts tensors (B, 1, L, L) of more than one row."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == (len(LENGTHS), 1, LONGEST, LONGEST):
            self.count += 1
        return result


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    backbones.plain_model(request.param).save_pretrained(folder)
    return backbone_class(folder).from_pretrained(folder, config=load_config(folder)).train()


def batch(side: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(3, 890, (len(LENGTHS), LONGEST), generator=torch.Generator().manual_seed(1))
    real = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
    mask = real if side == "right" else real.flip(1)
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, :3] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def one_pass(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits of the real tokens, loss and gradients, and the number of 4-D masks."""
    model.zero_grad()
    with Masks() as made:
        output = model(**inputs)
    output.loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return output.logits.detach()[inputs["attention_mask"]], {"loss": output.loss.detach()} | gradients, made.count


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model", backbones.MODELS, indirect=True)
def test_real_tokens_are_the_same_without_it(model: Any, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set_attn_implementation(implementation)
    logits, gradients, count = one_pass(model, batch())
    monkeypatch.setattr(masks, "_needs_no_padding_mask", lambda *args: False)
    expected, wanted, before = one_pass(model, batch())
    assert (count, before > 0) == (0, True)
    assert torch.equal(logits, expected)
    assert torch.equal(gradients["loss"], wanted["loss"])
    assert gradients.keys() == wanted.keys()
    for name, value in wanted.items():  # grouped heads are summed in another order; measured: 7.5e-8 of 0.35
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=5e-7)


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2, window"], indirect=True)
@pytest.mark.parametrize("side", ["right", "left"])
def test_torch_is_told_to_be_causal(model: Any, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask excludes the fast kernels; layers whose window is shorter than the rows need one, of one row."""
    model.set_attn_implementation("sdpa")
    seen: list[tuple[bool, tuple[int, ...] | None]] = []
    attend = nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        mask = kwargs["attn_mask"]
        seen.append((kwargs["is_causal"], None if mask is None else tuple(mask.shape)))
        return attend(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    inputs = batch(side) if side == "right" else batch(side) | {"labels": None}
    model(**inputs)
    rows = 1 if side == "right" else len(LENGTHS)
    windows = [kind == "sliding_attention" for kind in masks.layer_kinds(model.config)]
    whole = (True, None) if side == "right" else (False, (rows, 1, LONGEST, LONGEST))
    assert seen == [(False, (rows, 1, LONGEST, LONGEST)) if window else whole for window in windows]


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_only_an_unknown_mask_is_looked_at(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking waits for a GPU; of a batch that was spliced here the side is known."""
    model.set_attn_implementation("sdpa")
    looked: list[int] = []
    look = masks.is_right_padded
    monkeypatch.setattr(masks, "is_right_padded", lambda mask: looked.append(1) or look(mask))
    inputs = batch()
    expected, _, _ = one_pass(model, inputs)
    assert not looked
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    logits, _, count = one_pass(model, inputs | {"inputs_embeds": embeds})
    assert (len(looked), count) == (1, 0)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("model", ["llama", "qwen2, window"], indirect=True)
def test_prompts_padded_on_the_right_fill_a_cache(model: Any) -> None:
    """What follows sees the stored padding no more than before."""
    model.set_attn_implementation("sdpa")
    model.eval()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(LENGTHS), 1, dtype=torch.bool)], dim=1)
        places = torch.tensor(LENGTHS)[:, None]
        ids = torch.full((len(LENGTHS), 1), 5)
        later = model(input_ids=ids, attention_mask=mask, position_ids=places, cache=cache_of(first)).logits[:, 0]
        for row, length in enumerate(LENGTHS):
            if masks.layer_kinds(model.config)[-1] == "sliding_attention" and length < LONGEST:
                continue  # a window counts stored padding
            alone = torch.cat([inputs["input_ids"][row, :length], ids[row]])[None]
            torch.testing.assert_close(later[row], model(input_ids=alone).logits[0, -1], rtol=0, atol=2e-5)
    model.train()


@pytest.mark.parametrize(
    ("rows", "answer"),
    [("110 100", True), ("111", True), ("011", False), ("101", False), ("110 010", False), ("000 100", True)],
)
def test_what_is_padded_on_the_right(rows: str, answer: bool) -> None:
    mask = torch.tensor([[int(place) for place in row] for row in rows.split()])
    assert masks.is_right_padded(mask) == masks.is_right_padded(mask.bool()) == answer
