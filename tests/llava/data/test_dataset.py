"""Items, lengths and batches against the golden ones; rows that are bad; rows with several images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collator import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset
from llava.data.images import load_image_processor
from llava.data.rows import open_rows
from llava.data.skipped import count_skipped, read_skipped
from llava.data.templates import select_template
from llava.errors import BadImageError, BadSampleError, FlagError
from tests.golden import golden_dir, load_case
from tests.llava.runtime.tokenizers import make_tokenizer

CASE, TENSORS = load_case("llava", "dataset")
VARIANTS = list(zip(CASE["variants"], CASE["out"]["variants"], strict=True))
FOLDER = golden_dir("llava") / "data"

CUT_BEFORE_THE_ANSWER = {"v1_short": {2, 5}}
"""Rows whose first answer begins behind `model_max_length`: the original trains on nothing there, we refuse them."""


def make_dataset(data_path: Path, **options: Any) -> LazySupervisedDataset:
    """A data set with the tiny tokenizer and image processor."""
    length = options.get("model_max_length", 512)
    defaults = {
        "template": select_template("v1"),
        "image_folder": FOLDER / "images",
        "image_aspect_ratio": "pad",
        "is_multimodal": True,
        "mm_use_im_start_end": False,
        "model_max_length": length,
    }
    processor = load_image_processor(golden_dir("llava") / "tiny-clip")
    return LazySupervisedDataset(data_path, make_tokenizer(model_max_length=length), processor, **(defaults | options))


def golden_dataset(variant: dict, data_path: Path | None = None) -> LazySupervisedDataset:
    return make_dataset(
        data_path or golden_dir("llava") / variant["data"],
        template=select_template(variant["version"]),
        image_aspect_ratio=variant["image_aspect_ratio"],
        model_max_length=variant["model_max_length"],
    )


@pytest.mark.parametrize("as_lines", [False, True], ids=["json", "jsonl"])
@pytest.mark.parametrize(("variant", "golden"), VARIANTS, ids=[variant["name"] for variant, _ in VARIANTS])
def test_items_and_lengths(variant: dict, golden: dict, as_lines: bool, tmp_path: Path) -> None:
    path = golden_dir("llava") / variant["data"]
    if as_lines:
        rows = json.loads(path.read_text())
        path = tmp_path / "data.jsonl"
        path.write_text("\n\n".join(map(json.dumps, rows)))
    dataset = golden_dataset(variant, path)
    assert len(dataset) == golden["len"]
    assert dataset.lengths == golden["lengths"]
    assert dataset.modality_lengths == golden["modality_lengths"]
    refused = CUT_BEFORE_THE_ANSWER.get(variant["name"], set())
    for index, expected in enumerate(golden["items"]):
        if index in refused:
            assert set(expected["labels"][: variant["model_max_length"]]) == {IGNORE_INDEX}
            with pytest.raises(BadSampleError, match=rf"row {index} \(id 'f{index}'\): the first answer begins"):
                dataset[index]
            continue
        item = dataset[index]
        assert sorted(item) == expected["keys"]
        assert item["input_ids"].tolist() == expected["input_ids"]
        assert item["labels"].tolist() == expected["labels"]
        if expected["image"] == "zeros":
            assert torch.equal(item["image"], torch.zeros(3, 28, 28))
        elif expected["image"] in TENSORS:
            torch.testing.assert_close(item["image"], TENSORS[expected["image"]], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("variant", "golden"), VARIANTS, ids=[variant["name"] for variant, _ in VARIANTS])
def test_batches(variant: dict, golden: dict) -> None:
    dataset = golden_dataset(variant)
    collate = DataCollatorForSupervisedDataset(dataset.tokenizer)
    for expected in golden["batches"]:
        batch = collate([dataset[index] for index in expected["index"]])
        assert sorted(batch) == expected["keys"]
        for key in ("input_ids", "labels", "attention_mask"):
            assert batch[key].tolist() == expected[key]
        assert str(batch["attention_mask"].dtype) == expected["attention_mask_dtype"]
        assert list(batch["images"].shape) == expected["images_shape"]


def item_of(ids: list[int], image: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    item = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
    return item if image is None else item | {"image": image}


def test_the_mask_covers_unknown_tokens() -> None:
    batch = DataCollatorForSupervisedDataset(make_tokenizer())([item_of([1, 0, 5]), item_of([1])])
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert "images" not in batch


def test_images_of_all_rows_come_in_order() -> None:
    one, two = torch.full((3, 2, 2), 1.0), torch.full((2, 3, 2, 2), 2.0)
    collate = DataCollatorForSupervisedDataset(make_tokenizer())
    images = collate([item_of([1], one), item_of([1], two), item_of([1], one)])["images"]
    assert images[:, 0, 0, 0].tolist() == [1, 2, 2, 1]
    images = collate([item_of([1], one), item_of([1], torch.zeros(3, 4, 4))])["images"]
    assert [tuple(image.shape) for image in images] == [(3, 2, 2), (3, 4, 4)]


GOOD_TEXT = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
GOOD_IMAGE = {
    "id": "g",
    "image": "im0.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}],
}
BAD_ROWS = {
    "missing image": (GOOD_IMAGE | {"image": "absent.png"}, BadImageError, "image 'absent.png' is missing"),
    "image outside": (GOOD_IMAGE | {"image": "../finetune.json"}, BadImageError, "lies outside the image folder"),
    "two for one": (GOOD_IMAGE | {"image": ["im0.png", "im1.png"]}, BadSampleError, r"1 <image> .* 2 image\(s\)"),
    "strange image": (GOOD_IMAGE | {"image": 3}, BadSampleError, "'image' must be a file name"),
    "no conversations": ({"id": "x"}, BadSampleError, "turns|conversations"),
    "empty answer": (
        {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]},
        BadSampleError,
        "no answer to train on",
    ),
    "no object": ([1, 2], BadSampleError, "is no JSON object but"),
}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(("row", "kind", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_stops_the_run_and_is_named(row: Any, kind: type, message: str, tmp_path: Path) -> None:
    dataset = make_dataset(write_rows(tmp_path / "data.jsonl", [GOOD_TEXT, row]))
    assert dataset[0]["input_ids"][0] == 1
    with pytest.raises(kind, match=f"(?s)data.jsonl, row 1.*{message}"):
        dataset[1]


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    dataset = make_dataset(write_rows(tmp_path / "data.jsonl", [GOOD_TEXT, '{"id": ']))
    with pytest.raises(BadSampleError, match=r"data.jsonl, row 1 is no JSON"):
        dataset[1]
    with pytest.raises(BadSampleError, match=r"data.jsonl, row 1 is no JSON"):
        _ = dataset.lengths


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_replaced_counted_and_listed(workers: int, tmp_path: Path) -> None:
    bad = [row for row, _, _ in BAD_ROWS.values()]
    path = write_rows(tmp_path / "data.jsonl", [*bad, "{", GOOD_TEXT, GOOD_IMAGE])
    skipped_file = tmp_path / "out" / "skipped.jsonl"
    dataset = make_dataset(path, on_bad_sample="skip", skipped_file=skipped_file)
    assert len(dataset.modality_lengths) == len(bad) + 3
    assert 0 not in dataset.modality_lengths
    collate = DataCollatorForSupervisedDataset(dataset.tokenizer)
    for _epoch in range(2):
        batches = list(DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=collate))
        has_image = [IMAGE_TOKEN_INDEX in batch["input_ids"] for batch in batches]
        assert has_image == [length > 0 for length in dataset.modality_lengths]
    assert count_skipped(skipped_file) == len(bad) + 1
    listed = read_skipped(skipped_file)
    assert [entry["row"] for entry in listed] == list(range(len(bad) + 1))
    assert listed[0]["id"] == "g"
    assert "absent.png" in listed[0]["reason"]


def test_several_files_are_used_as_one(tmp_path: Path) -> None:
    """Errors, the list of skipped rows and the order name the file that a row is in, and its number there."""
    first = write_rows(tmp_path / "a.jsonl", [GOOD_TEXT, GOOD_IMAGE])
    second = tmp_path / "b.json"
    second.write_text(json.dumps([BAD_ROWS["missing image"][0], GOOD_TEXT | {"id": "u"}, GOOD_IMAGE]))
    dataset = make_dataset([first, second])
    assert [dataset.rows[index].get("id") for index in range(5)] == ["t", "g", "g", "u", "g"]
    assert [length > 0 for length in dataset.modality_lengths] == [False, True, True, False, True]
    assert dataset[3]["input_ids"].tolist() == dataset[0]["input_ids"].tolist()
    with pytest.raises(BadImageError, match=r"b\.json, row 0 \(id 'g'\).*absent\.png"):
        dataset[2]
    with pytest.raises(IndexError):
        dataset.rows[5]
    skipping = make_dataset([first, second], on_bad_sample="skip", skipped_file=tmp_path / "skipped.jsonl")
    assert torch.equal(skipping[2]["image"], skipping[4]["image"])
    (entry,) = read_skipped(tmp_path / "skipped.jsonl")
    assert (entry["file"], entry["row"], entry["id"]) == (str(second), 0, "g")
    assert make_dataset([first]).modality_lengths == make_dataset(first).modality_lengths


def test_a_row_without_words_is_named_when_modalities_are_grouped(tmp_path: Path) -> None:
    row = {"id": "e", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": " "}]}
    paths = [write_rows(tmp_path / name, rows) for name, rows in (("a.jsonl", [GOOD_TEXT]), ("b.jsonl", [row]))]
    with pytest.raises(FlagError, match=r"b\.jsonl, row 0 has no words"):
        _ = make_dataset(paths).modality_lengths


def test_stopping_leaves_no_list(tmp_path: Path) -> None:
    assert read_skipped(tmp_path / "skipped.jsonl") == []
    assert count_skipped(tmp_path / "skipped.jsonl") == 0


def test_a_modality_without_good_rows_stops_even_when_skipping(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", [GOOD_IMAGE | {"image": "absent.png"}, GOOD_TEXT])
    dataset = make_dataset(path, on_bad_sample="skip", skipped_file=tmp_path / "skipped.jsonl")
    with pytest.raises(BadSampleError, match="no row with image can be trained on"):
        dataset[0]
    assert dataset[1]["labels"].max() > 0


def test_several_images_make_one_item(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Compare <image> and <image>."}, {"from": "gpt", "value": "Same."}]
    row = {"id": "two", "image": ["im0.png", "im3.png"], "conversations": turns}
    dataset = make_dataset(write_rows(tmp_path / "data.jsonl", [row, GOOD_IMAGE]))
    item = dataset[0]
    assert item["image"].shape == (2, 3, 28, 28)
    assert item["input_ids"].tolist().count(IMAGE_TOKEN_INDEX) == 2
    assert torch.equal(item["image"][0], dataset[1]["image"])
    assert dataset.lengths == [4 + 2 * 128 + 1, 2 + 128 + 2]


def test_rows_without_image_in_a_text_model(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", [GOOD_TEXT | {"image": None}, GOOD_IMAGE])
    dataset = make_dataset(path, is_multimodal=False)
    assert sorted(dataset[0]) == ["input_ids", "labels"]
    with pytest.raises(FlagError, match=r"row 1 \(id 'g'\) has an image but the model has no vision tower"):
        dataset[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_sample": "ignore"}, "--on_bad_sample ignore: not known; known: stop, skip"),
        ({"on_bad_sample": "skip"}, "needs a file to list"),
        ({"image_aspect_ratio": "round"}, "--image_aspect_ratio round"),
    ],
)
def test_contradicting_options(options: dict, message: str) -> None:
    with pytest.raises(FlagError, match=message):
        make_dataset(FOLDER / "finetune.json", **options)


def test_an_image_without_folder_is_a_flag_error() -> None:
    with pytest.raises(FlagError, match=r"names the image 'im0.png'; set --image_folder"):
        make_dataset(FOLDER / "finetune.json", image_folder=None)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no rows"), ("\n \n", "holds no rows"), ("[]", "holds no rows"), ('[{"id": 1}', "is none")],
)
def test_unusable_data_files(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(FlagError, match=f"data.json: .*{message}"):
        open_rows(path)


def test_a_missing_data_file(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="no such file"):
        open_rows(tmp_path / "absent.json")


@pytest.mark.parametrize("content", ['{"id": 1}\r\n\r\n{"id": 2}', '[\n {"id": 1},\n {"id": 2}\n]'])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_records_with_blank_lines_and_byte_order_mark(content: str, mark: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text(mark + content, encoding="utf-8", newline="")
    assert list(open_rows(path)) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize("on_bad_sample", ["stop", "skip"])
def test_requires_image_leaves_text_out(on_bad_sample: str, tmp_path: Path) -> None:
    """Exactly the rows with an image, each once; the original repeats some of them and never reaches others."""
    with_image = [0, 1, 0, 1, 1, 0, 0, 1, 0]
    rows = [
        {"id": index, "conversations": GOOD_IMAGE["conversations"] if flag else GOOD_TEXT["conversations"]}
        | ({"image": GOOD_IMAGE["image"]} if flag else {})
        for index, flag in enumerate(with_image)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    options = {"on_bad_sample": on_bad_sample, "skipped_file": tmp_path / "skipped.jsonl"}
    dataset = make_dataset(path, requires_image=True, **options)
    assert [dataset.rows[index]["id"] for index in range(len(dataset))] == [1, 3, 4, 7]
    assert dataset.left_out == 5
    assert len(dataset.lengths) == len(dataset.modality_lengths) == 4
    assert all(length > 0 for length in dataset.modality_lengths)
    assert dataset.rows.name(3).endswith("row 7")
    assert all(dataset[index]["image"].any() for index in range(4))
    rows[1]["image"] = 3
    path.write_text(json.dumps(rows))
    if on_bad_sample == "stop":
        with pytest.raises(BadSampleError, match="row 1: 'image' must be a file name"):
            make_dataset(path, requires_image=True, **options)
    else:
        assert len(make_dataset(path, requires_image=True, **options)) == 3
        assert count_skipped(tmp_path / "skipped.jsonl") == 1
    path.write_text(json.dumps([row for row in rows if "image" not in row]))
    with pytest.raises(FlagError, match="none of the 5 rows"):
        make_dataset(path, requires_image=True, **options)
