"""Plans of spliced batches against a slow reference that walks over every position, and the model that follows them."""

from __future__ import annotations

import dataclasses
import pickle
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collator import DataCollatorForSupervisedDataset
from llava.data.splice_plan import plan_splice
from llava.data.targets import BUCKET
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.segments import Span, SpliceOptions, SplicePlan
from tests.golden import golden_dir

I = IMAGE_TOKEN_INDEX  # noqa: E741
MARKER = (7, 8)


class Case(NamedTuple):
    """Rows of token ids, the length of each image in order (None: no images at all), and what is cut."""

    rows: list[list[int]]
    lengths: list[int] | None
    limit: int | None = None


CASES = {
    "one image each": Case([[1, 5, I, 6, 9], [1, I, 4, 3, 2]], [4, 4]),
    "several images, none, and different lengths": Case([[1, I, 5, I, I, 9], [2, 3], [I, 4]], [3, 1, 5, 9, 2]),
    "images next to each other, at both ends": Case([[I, I], [3, I]], [2, 3, 4]),
    "text alone in a batch with images": Case([[1, 2, 3, 4], [5]], [3, 3]),
    "text alone": Case([[1, 2, 3, 4], [5]], None),
    "text alone is never cut": Case([[1, 2, 3, 4], [5]], None, 2),
    "cut in an image": Case([[1, 2, I, 5, 6], [3, I, 4]], [4, 4], 4),
    "cut before an image, behind an image, and in text": Case(
        [[1, 2, 3, 4, I, 6], [I, 3, 4], [5, 6, 7, 8]], [2, 3, 1], 3
    ),
    "two turns with a marker": Case([[1, I, 7, 8, 5, 9, 7, 8, 6, 4, 3]], [2]),
}


def collated(case: Case, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and mask (B, T), padded on `side`; every even token id is trained on."""
    longest = max(map(len, case.rows))
    ids = torch.full((len(case.rows), longest), 99)
    labels, mask = torch.full_like(ids, 98), torch.zeros_like(ids, dtype=torch.bool)  # what is masked must not matter
    for number, row in enumerate(case.rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, place] = torch.tensor(row)
        labels[number, place] = torch.tensor([token if token > 0 and token % 2 == 0 else IGNORE_INDEX for token in row])
        mask[number, place] = True
    return ids, labels, mask


def reference(case: Case, side: str) -> dict[str, list[list[Any]]]:
    """Every position of every row as (token or None, feature or None, label), position and mask, by plain loops."""
    numbers = iter(range(sum(case.lengths or [])))
    lengths = iter(case.lengths or [])
    rows = []
    for row in case.rows:
        found: list[tuple[int, int | None, int]] = []
        for token in row:
            if token == I:
                found += [(0, next(numbers), IGNORE_INDEX) for _ in range(next(lengths))]
            else:
                found.append((token, None, token if token % 2 == 0 else IGNORE_INDEX))
        if case.lengths is not None and I not in row:
            for _ in range(next(lengths)):
                next(numbers)
        rows.append(found[: None if case.lengths is None else case.limit])
    longest = max(map(len, rows))
    names = ("ids", "features", "labels", "positions", "mask")
    table: dict[str, list[list[Any]]] = {name: [] for name in names}
    for found in rows:
        kept = [(*place, number, True) for number, place in enumerate(found)]
        padding = [(0, None, IGNORE_INDEX, 0, False)] * (longest - len(found))
        whole = padding + kept if side == "left" else kept + padding
        for name, column in zip(names, zip(*whole, strict=True), strict=True):
            table[name].append(list(column))
    return table


def plan_of(case: Case, side: str, tokens_on: str = "right") -> SplicePlan:
    options = SpliceOptions(case.limit, side, MARKER)
    return plan_splice(*collated(case, tokens_on), case.lengths, options)


@pytest.mark.parametrize("tokens_on", ["right", "left"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_every_position_is_where_the_reference_has_it(name: str, side: str, tokens_on: str) -> None:
    case = CASES[name]
    plan, expected = plan_of(case, side, tokens_on), reference(case, side)
    assert plan.input_ids.tolist() == expected["ids"]
    assert plan.labels.tolist() == expected["labels"]
    assert plan.position_ids.tolist() == expected["positions"]
    assert plan.attention_mask.tolist() == expected["mask"]
    flat = [number for row in expected["features"] for number in row]
    placed = [(place, number) for place, number in enumerate(flat) if number is not None]
    assert plan.slots.tolist() == [place for place, _ in placed]
    rows = range(plan.features or 0) if plan.feature_rows is None else plan.feature_rows.tolist()
    assert list(rows) == [number for _, number in placed]
    # A target is predicted by the position before it in its row.
    labels = expected["labels"]
    width = len(labels[0])
    targets = [
        (row * width + place - 1, label)
        for row, found in enumerate(labels)
        for place, label in enumerate(found)
        if place and label != IGNORE_INDEX
    ]
    assert plan.targets == len(targets)
    padded = len(plan.target_positions)
    assert padded % BUCKET == 0
    assert padded >= max(1, len(targets))
    filler = [(0, IGNORE_INDEX)] * (padded - len(targets))
    assert list(zip(plan.target_positions.tolist(), plan.target_labels.tolist(), strict=True)) == targets + filler
    uneven = len({sum(row) for row in expected["mask"]}) > 1
    assert plan.padding == (side if uneven else "none")


def test_segments_are_in_the_spliced_row() -> None:
    """System, image, last question and answer; cut and moved with the row."""
    case = CASES["two turns with a marker"]
    (found,) = plan_of(case, "right").segments
    # 1, image of 2, then 7 8 5 9 7 8 6 4 3: ids are trained if even, and the last ignored one is 3.
    assert found.system == Span(0, 1)
    assert found.images == (Span(1, 3),)
    assert found.instruct == Span(3, 12)
    assert found.last_instruct == Span(7, 12)
    assert found.answer == Span(12, 12)
    (cut,) = plan_of(case._replace(limit=2), "right").segments
    assert cut.images == (Span(1, 2),)
    two = plan_of(Case([case.rows[0], [1]], [2, 2]), "left").segments
    assert two[1].system == Span(11, 11)


def test_wrong_numbers_of_images_are_refused() -> None:
    case = CASES["one image each"]
    with pytest.raises(ValueError, match=r"needs 2 images \(image tokens per row: \[1, 1\].* but 1 were given"):
        plan_of(case._replace(lengths=[4]), "right")
    with pytest.raises(ValueError, match=r"rows \[0, 1\] hold <image> tokens, but no images were passed"):
        plan_of(case._replace(lengths=None), "right")


# The model


@pytest.fixture(scope="module")
def model() -> LlavaLlamaForCausalLM:
    loaded = load_pretrained_model(str(golden_dir("llava") / "tiny-llava-v1.5"), device="cpu")[1]
    return loaded.requires_grad_(True)


def items() -> list[dict[str, Tensor]]:
    """Rows with one image, none (with its dummy), and two."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for ids, images in (([1, 5, I, 8, 6, 4], 1), ([1, 9, 2, 4], 1), ([1, I, 3, I, 6, 2, 8], 2)):
        tokens = torch.tensor(ids)
        labels = torch.where((tokens > 0) & (tokens % 2 == 0), tokens, IGNORE_INDEX)
        pixels = torch.randn(images, 3, 28, 28, generator=generator)
        found.append({"input_ids": tokens, "labels": labels, "image": pixels})
    return found


def batch_of(model: LlavaLlamaForCausalLM) -> dict[str, Any]:
    tokenizer: Any = SimpleNamespace(model_max_length=512, pad_token_id=0)
    return DataCollatorForSupervisedDataset(tokenizer, model.splice_planner())(items())


@pytest.mark.parametrize("limit", [512, 9], ids=["whole", "cut"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_planned_and_unplanned_batches_are_the_same(
    model: LlavaLlamaForCausalLM, side: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors, loss and gradients, bit for bit; the plan survives the way from a worker process."""
    monkeypatch.setattr(model.config, "tokenizer_padding_side", side, raising=False)
    monkeypatch.setattr(model.config, "tokenizer_model_max_length", limit, raising=False)
    batch = batch_of(model)
    batch["plan"] = pickle.loads(pickle.dumps(batch["plan"]))  # noqa: S301
    plain = {name: value for name, value in batch.items() if name != "plan"}
    planned, unplanned = model.build_inputs(**batch), model.build_inputs(**plain)
    assert planned.inputs_embeds.shape[1] <= limit
    for name in ("inputs_embeds", "labels", "attention_mask", "position_ids"):
        assert torch.equal(getattr(planned, name), getattr(unplanned, name)), name
    assert planned.segments == unplanned.segments
    assert not planned.inputs_embeds[~planned.attention_mask].any()
    gradients = []
    for given in (batch, plain):
        model.zero_grad(set_to_none=True)
        output = model(**given)
        output.loss.backward()
        gradients.append([output.loss, *(each.grad for each in model.parameters() if each.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    with torch.no_grad():
        without = model(**{name: value for name, value in batch.items() if name != "labels"})
    assert without.loss is None


def test_a_plan_of_another_batch_or_model_is_refused(model: LlavaLlamaForCausalLM) -> None:
    batch = batch_of(model)
    plan = batch["plan"]
    length = batch["input_ids"].shape[1]
    with pytest.raises(
        ValueError, match=rf"the plan is of ids of shape \(3, {length}\), the batch has \(2, {length}\)"
    ):
        model(**(batch | {"input_ids": batch["input_ids"][:2]}))
    stale = batch["input_ids"].clone()
    stale[1, 0] += 1
    with pytest.raises(ValueError, match=r"the plan is of other ids than those of the batch in rows \[1\]"):
        model(**(batch | {"input_ids": stale}))
    model(**(batch | {"input_ids": batch["input_ids"].clone()}))  # equal ids, as after a copy between processes
    with pytest.raises(ValueError, match="`plan` goes with the `input_ids` of a first pass"):
        model(inputs_embeds=torch.zeros(3, 2, model.config.hidden_size), plan=plan)
    with pytest.raises(ValueError, match=r"max_length=3.*configuration of the model says.*max_length"):
        model(**(batch | {"plan": dataclasses.replace(plan, options=SpliceOptions(3, "right"))}))
    with pytest.raises(ValueError, match=r"for 16 rows of image features, but .* give 12"):
        model(**(batch | {"images": batch["images"][:3]}))
    with pytest.raises(ValueError, match=r"for 16 rows of image features, but .* give None"):
        model(**(batch | {"images": None}))


def test_a_plan_goes_to_a_device_whole(model: LlavaLlamaForCausalLM) -> None:
    plan = batch_of(model)["plan"]
    moved = plan.to("meta")
    assert plan.to("cpu") is plan
    tensors = {name for name, value in vars(plan).items() if isinstance(value, Tensor)}
    assert len(tensors) >= 7
    assert {getattr(moved, name).device.type for name in tensors - {"source"}} == {"meta"}
    assert moved.source is plan.source, "what the plan was made of stays where the ids were"
    assert moved.targets == plan.targets
