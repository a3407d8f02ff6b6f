"""What extensions say of an answer: the same in a batch, padded on either side, as alone, and what really happened."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from dynamic.config import SparseConfig
from dynamic.extension import DynamicExtension
from dynamic.inspection import record_decisions
from hydralora.config import HydraLoraSettings, RoutedLinearConfig
from hydralora.extension import HydraLoraExtension
from hydralora.linears import routed_updates
from hydralora.model import record_routing
from llava.details import AnsweredRow, Detail, KeptPatches, KeptWords, Shares, formatted
from llava.model.builder import load_pretrained_model
from mma.config import MmaConfig
from mma.modality import routing_table
from tests.dynamic.sparse_models import SMALL, attach_predictors, sparse_llava
from tests.llava.model.test_generation import BASE, ROUTED, prompts
from tests.mma.adapted_models import adapted_llava

pytestmark = pytest.mark.versions

NEW = 5
IMAGES_ALONE = SparseConfig(**{**SMALL.to_dict(), "use_text_predictor": False})


class Letters:
    """A tokenizer: each id is a letter of its own."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(0x4E00 + number) for number in ids)


def base() -> Any:
    return load_pretrained_model(str(BASE), device="cpu")[1]


def routed() -> Any:
    return load_pretrained_model(str(ROUTED), str(BASE), device="cpu")[1]


def routed_attention(model: Any, experts: int = 3) -> Any:
    linear = RoutedLinearConfig(["attention.q_proj", "attention.o_proj"], experts=experts, rank=2)
    model.extensions.attach(model, HydraLoraExtension(), HydraLoraSettings(None, linear).to_dict())
    for update in routed_updates(model.get_decoder().layers).values():
        torch.nn.init.normal_(update.router)
    return model


MODELS = {
    "sparse": sparse_llava,
    "sparse in images alone": lambda: sparse_llava(IMAGES_ALONE),
    "routed MLP": routed,
    "sparse, then routed attention": lambda: routed_attention(sparse_llava()),
    "routed attention, then sparse": lambda: attach_predictors(routed_attention(base())),
    "mixed adapters": adapted_llava,
}


def generated(model: Any, ids: torch.Tensor, images: Any, mask: torch.Tensor | None = None) -> tuple[Any, Any]:
    """Ids (B, NEW), and the details of each row."""
    masks = torch.ones_like(ids) if mask is None else mask
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
    with model.extensions.observe(model) as describe, torch.no_grad():
        output = model.generate(ids, images=images, attention_mask=mask, **options)
        rows = [
            formatted(describe(AnsweredRow(row, own[own_mask.bool()], output[row].tolist(), Letters())))
            for row, (own, own_mask) in enumerate(zip(ids, masks, strict=True))
        ]
    return output, rows


def alone(model: Any, number: int) -> tuple[Any, dict[str, list[Detail]]]:
    """Ids (NEW,) and details of one of the prompts: one image, two images, none."""
    batch = prompts()
    images = batch.images_of_rows[number]
    output, (said,) = generated(model, batch.rows[number][None], images if len(images) else None)
    return output[0], said


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_a_batch_says_what_it_says_alone(name: str, side: str) -> None:
    model = MODELS[name]()
    batch = prompts(side)
    _, together = generated(model, batch.ids, batch.images, batch.mask)
    assert any(together)
    assert together == [alone(model, number)[1] for number in range(len(batch.rows))]
    assert not model.extensions._observations


def test_what_each_method_says() -> None:
    said = {name: alone(make(), 1)[1] for name, make in MODELS.items()}
    kinds = {name: {key: Counter(map(type, details)) for key, details in each.items()} for name, each in said.items()}
    kept = {"dynamic": Counter({KeptPatches: 2, KeptWords: 2})}
    assert kinds["sparse"] == kinds["sparse in images alone"] == kept
    assert kinds["routed MLP"] == {"hydralora": Counter({Shares: 1})}
    assert kinds["sparse, then routed attention"] == kept | {"hydralora": Counter({Shares: 2})}
    assert kinds["mixed adapters"] == {"mma": Counter({Shares: 1})}
    titles = [shares.title for shares in said["sparse, then routed attention"]["hydralora"]]
    assert titles == ["Expert utilization: self_attn.o_proj", "Expert utilization: self_attn.q_proj"]


def test_patches_and_words_are_those_of_the_decisions() -> None:
    model = sparse_llava()
    with record_decisions(model) as log:
        output, said = alone(model, 1)
    first, second, instruction, answer = said["dynamic"]
    side = model.get_vision_tower().num_patches_per_side
    for number, patches in enumerate((first, second)):
        assert (patches.image, patches.grid) == (number, (side, side))
        assert list(patches.kept) == log.prompts[0].images(0)[number].tolist()
        assert 0 < len(patches.kept) < side * side
    text = "".join(word for word, _ in instruction.words)
    assert text
    letters = Letters().decode([number for number in prompts().rows[1].tolist() if number >= 0])
    assert letters.endswith(text), "the instruction ends the prompt"
    assert [index for index, (_, kept) in enumerate(instruction.words) if kept] == log.prompts[0].instruction(
        0
    ).tolist()
    assert [kept for _, kept in answer.words] == log.stored()[0].tolist()
    assert "".join(word for word, _ in answer.words) == Letters().decode(output[: NEW - 1].tolist())


def test_utilization_is_that_of_the_routing() -> None:
    model = routed()
    with record_routing(model) as routing:
        _, said = alone(model, 0)
    (shares,) = said["hydralora"]
    assert len(shares.rows) == len(routing) == len(model.get_decoder().layers)
    assert len({values for _, values in shares.rows}) > 1
    for (label, values), (block, passes) in zip(shares.rows, routing.items(), strict=True):
        assert label.removeprefix("layer ") in block.split(".")
        assert len(passes) == NEW  # the prompt, and each new token but the last
        chosen = torch.cat([each[0] for each in passes]).argmax(-1)
        expected = torch.bincount(chosen, minlength=len(shares.parts)) / len(chosen)
        assert values == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("number", [0, 2], ids=["image", "text"])
def test_weights_are_those_of_the_modality(number: int) -> None:
    model = adapted_llava()
    (shares,) = alone(model, number)[1]["mma"]
    assert ("image" in shares.title) == (number == 0)
    with torch.no_grad():
        table = routing_table(model.get_decoder(), torch.float32)[:, int(number == 0)]
    assert torch.tensor([values for _, values in shares.rows]).allclose(table.flatten(0, 1))
    assert len(shares.rows) == table.shape[0] * table.shape[1]


def test_nothing_is_said_of_what_does_nothing() -> None:
    """A base, predictors that keep everything, a single expert, no adapters in the decoder."""
    assert alone(base(), 0)[1] == {}
    dense = SparseConfig(**{**IMAGES_ALONE.to_dict(), "vision_keep_rate": 1.0})
    assert DynamicExtension().observe(base(), dense.to_dict()) is None
    assert alone(routed_attention(base(), experts=1), 0)[1] == {}
    assert alone(adapted_llava(MmaConfig(adapter_type="none")), 0)[1] == {}
