"""Conversations with several images in several turns, from the data file through the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.constants import IGNORE_INDEX
from llava.data.collator import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset
from llava.data.images import load_image_processor
from llava.data.templates import select_template
from llava.model.builder import load_pretrained_model
from tests.golden import golden_dir
from tests.llava.runtime.tokenizers import make_tokenizer

LLAVA = golden_dir("llava")


def row(images: list[str], *texts: str) -> dict[str, Any]:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": "x", "image": images, "conversations": turns}


THREE = ("<image> or <image>?", "The first.", "And <image>?", "No.")
ROWS = [
    row(["im0.png", "im1.png", "im3.png"], *THREE),
    row([], "Name a bird.", "A crow."),
    row(["im1.png", "im0.png", "im3.png"], *THREE),
    row(["im4.png"], "<image>\nWhat?", "A lake.", "Sure?", "Yes."),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_pretrained_model(str(LLAVA / "tiny-llava-v1.5"), device="cpu")[1]


@pytest.fixture
def dataset(tmp_path: Path) -> LazySupervisedDataset:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(ROWS))
    return LazySupervisedDataset(
        path,
        make_tokenizer(),
        load_image_processor(LLAVA / "tiny-clip"),
        template=select_template("v1"),
        image_folder=LLAVA / "data" / "images",
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
        model_max_length=512,
    )


def logits_at_targets(model: Any, dataset: LazySupervisedDataset, rows: list[int]) -> list[torch.Tensor]:
    """Logits (targets, V) of each row of a batch that were computed together."""
    batch = DataCollatorForSupervisedDataset(make_tokenizer())([dataset[index] for index in rows])
    labels = model.build_inputs(batch["input_ids"], batch["attention_mask"], batch["labels"], batch["images"]).labels
    with torch.no_grad():
        logits = model(**batch).logits
    return [logits[place][labels[place] != IGNORE_INDEX] for place in range(len(rows))]


def test_a_batch_of_rows_with_different_numbers_of_images_is_right(model: Any, dataset: LazySupervisedDataset) -> None:
    together = logits_at_targets(model, dataset, [0, 1, 2, 3])
    for index, logits in enumerate(together):
        torch.testing.assert_close(logits, logits_at_targets(model, dataset, [index])[0], rtol=0, atol=1e-5)
    # The rows 0 and 2 differ in the order of two images only.
    assert not torch.allclose(together[0], together[2], atol=1e-3)


def test_every_image_lies_where_its_turn_says(model: Any, dataset: LazySupervisedDataset) -> None:
    batch = DataCollatorForSupervisedDataset(make_tokenizer())([dataset[0]])
    inputs = model.build_inputs(batch["input_ids"], None, batch["labels"], batch["images"])
    features = model.image_features(batch["images"])
    spans = inputs.segments[0].images
    assert len(spans) == len(features) == 3
    for span, feature in zip(spans, features, strict=True):
        assert torch.equal(inputs.inputs_embeds[0, span.start : span.end], feature)
        assert (inputs.labels[0, span.start : span.end] == IGNORE_INDEX).all()
    answer = make_tokenizer()("The first.</s>", add_special_tokens=False).input_ids
    between = inputs.labels[0, spans[1].end : spans[2].start]
    assert [label for label in between.tolist() if label != IGNORE_INDEX] == answer
