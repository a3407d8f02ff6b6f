"""LaVIN's data, equal to the original: prompts, token ids, labels, pixels, the mixture of the chatbot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collator import DataCollatorForSupervisedDataset
from llava.data.images import ImageTransform, load_image
from llava.errors import BadSampleError, FlagError, NoTargetError
from llava.model.multimodal_encoder.builder import set_normalization
from llava.runtime.tokenizer import load_tokenizer
from mma.extension import IMAGE_FLAGS
from mma.lavin.data import mixture
from mma.lavin.data.dataset import ASPECT_RATIO, LavinDataset
from mma.lavin.data.instructions import read_mixture
from mma.lavin.data.prompts import FORMATS, build_prompt
from mma.lavin.data.scienceqa import read_split, training_rows
from mma.lavin.data.tokens import encode, head_ids, prompt_ids, sample_ids
from tests.golden import golden_dir, load_case

PROMPTS = load_case("lavin", "prompts")[0]
TOKENS, TOKEN_TENSORS = load_case("lavin", "scienceqa_tokens")
INSTRUCT, INSTRUCT_TENSORS = load_case("lavin", "instruct_tokens")
MIXTURE = load_case("lavin", "data_processing")[0]
PIXELS, PIXEL_TENSORS = load_case("lavin", "image_transform")
IMAGES = golden_dir("lavin") / "images"


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "corrected"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """The form of the tokenizer, which a folder's settings decide, has no influence here."""
    return load_tokenizer(golden_dir("tokenizer"), legacy=request.param)


def caption_of(qid: str, used: bool) -> str | None:
    return PROMPTS["captions"].get(qid, "") if used else None


def clip_processor(side: int = 224) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def lavin_processor(side: int = 224) -> CLIPImageProcessorPil:
    processor = clip_processor(side)
    set_normalization(processor, IMAGE_FLAGS["mm_image_normalization"][2])
    return processor


def save_problems(root: Path, images: Path | None = None) -> None:
    """`data_root` of the cases; images are those of the cases where there is one, else a grey square."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "problems.json").write_text(json.dumps(PROMPTS["problems"]))
    (root / "captions.json").write_text(json.dumps({"captions": PROMPTS["captions"]}))
    splits: dict[str, list[str]] = {"test": ["60"]}
    for run in TOKENS["runs"]:
        splits[run["split"]] = run["qids"]
    (root / "pid_splits.json").write_text(json.dumps(splits))
    for split, ids in splits.items():
        for qid in ids:
            if PROMPTS["problems"][qid]["image"] is None or images is None:
                continue
            target = root / "images" / split / qid / "image.png"
            target.parent.mkdir(parents=True)
            source = images / f"{qid}.png"
            image = Image.open(source) if source.exists() else Image.new("RGB", (30, 20), (90, 90, 90))
            image.save(target)


# Prompts


def test_formats_are_those_of_the_original() -> None:
    assert list(FORMATS) == PROMPTS["cli_formats"]


@pytest.mark.parametrize("used", [False, True], ids=["without captions", "with captions"])
def test_prompts(used: bool) -> None:
    cases = PROMPTS["build_prompt"][f"use_caption={used}"]
    compared = 0
    for qid, case in cases.items():
        problem, caption = PROMPTS["problems"][qid], caption_of(qid, used)
        for half, text in case["prompt"].items():
            assert build_prompt(problem, f"{half}-A", caption=caption)[0] == text
        for half, text in case["answer"].items():
            assert build_prompt(problem, f"QCM-{half}", caption=caption)[1] == text
        compared += len(case["prompt"]) + len(case["answer"])
    assert compared > 150


# Token ids and labels


def test_what_stands_in_front(tokenizer: Any) -> None:
    for text, ids in TOKENS["prefix_ids"].items():
        assert encode(tokenizer, text) == ids["training_bos_false"]
    with_image, without = (TOKENS["prefix_ids"][text]["inference_bos_true"] for text in ("Image: ", "Image: N/A"))
    assert head_ids(tokenizer, True) == [*with_image, IMAGE_TOKEN_INDEX]
    assert head_ids(tokenizer, False) == without
    assert prompt_ids(tokenizer, "Hi", False).tolist() == [*without, *encode(tokenizer, "Hi")]


def test_special_tokens_in_a_text_are_text(tokenizer: Any) -> None:
    assert tokenizer.eos_token_id not in encode(tokenizer, "end </s> of <unk>")
    assert encode(tokenizer, "") == []


def check_sample(ids: Tensor, labels: Tensor, head: list[int], example: list[int], target: list[int]) -> None:
    """Ours against an example of the original, which has no words in front and is cut or padded."""
    assert ids[: len(head)].tolist() == head
    assert (labels[: len(head)] == IGNORE_INDEX).all()
    assert [head[0], *ids[len(head) :].tolist()][: len(example)] == example
    shifted = [0, *labels[len(head) :].masked_fill(labels[len(head) :] == IGNORE_INDEX, 0).tolist()]
    assert shifted[: len(target)] == target


@pytest.mark.parametrize("run", range(4))
def test_token_ids_and_labels_of_scienceqa(run: int, tokenizer: Any, tmp_path: Path) -> None:
    settings = TOKENS["runs"][run]
    save_problems(tmp_path)
    captions = tmp_path / "captions.json" if settings["use_caption"] else None
    data = read_split(tmp_path, settings["split"], captions)
    assert list(data.ids) == settings["qids"]
    for number in range(len(data)):
        has_image = bool(settings["indicators"][number])
        assert (data.image(number) is not None) == has_image
        ids, labels = sample_ids(tokenizer, *data.prompt_and_answer(number, settings["prompt_format"]), has_image)
        filled = settings["n_nonpad"][number]
        example = TOKEN_TENSORS[f"run{run}/examples"][number, :filled].tolist()
        target = TOKEN_TENSORS[f"run{run}/labels"][number, :filled].tolist()
        check_sample(ids, labels, head_ids(tokenizer, has_image), example, target)
        cut = labels[len(head_ids(tokenizer, has_image)) :][: settings["max_words"] - 1]
        assert int((cut != IGNORE_INDEX).sum()) == settings["n_label"][number]


@pytest.mark.parametrize("run", range(len(INSTRUCT["runs"])))
def test_token_ids_and_labels_of_instructions(run: int, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "all_data.json").write_text(json.dumps(INSTRUCT["all_data"]))
    rows, _ = read_mixture(tmp_path)
    assert len(rows) == len(INSTRUCT["runs"][run]["items"])
    for number, item in enumerate(INSTRUCT["runs"][run]["items"]):
        row = rows[number]
        assert row["id"] == item["qid"]
        assert ("image" in row) == bool(item["indicator"])
        prompt, answer = (turn["value"] for turn in row["conversations"])
        ids, labels = sample_ids(tokenizer, prompt, answer, bool(item["indicator"]))
        example = INSTRUCT_TENSORS[f"run{run}/{number}/example"].tolist()
        target = INSTRUCT_TENSORS[f"run{run}/{number}/labels"].tolist()
        check_sample(ids, labels, head_ids(tokenizer, bool(item["indicator"])), example, target)


# Pixels


@pytest.mark.parametrize("case", PIXELS["images"], ids=lambda case: case["mode"])
def test_pixels(case: dict[str, Any]) -> None:
    """The tolerance is that of the golden data; seen: 3e-7."""
    qid = case["qid"]
    image = load_image(IMAGES, Path(case["file"]).name)
    pixels = ImageTransform(lavin_processor(), ASPECT_RATIO)(image).pixels
    assert pixels.shape == (3, 224, 224)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(pixels[:, ::16, ::16], PIXEL_TENSORS[f"{qid}/out_every_16th"], **close)
    window = pixels[:, 100:124, 100:124]
    torch.testing.assert_close(window, PIXEL_TENSORS[f"{qid}/out_center_24x24"], **close)
    np.testing.assert_allclose(pixels.mean(dim=(1, 2)), case["mean_per_channel"], atol=1e-5)
    plain = ImageTransform(clip_processor(), ASPECT_RATIO)(image).pixels
    assert (plain - pixels).abs().max() > 0.05  # CLIP's own statistics give other values


# The mixture


def save_mixture_inputs(root: Path) -> None:
    root.mkdir(exist_ok=True)
    for name, content in MIXTURE["inputs"].items():
        (root / name).write_text(json.dumps(content))


def test_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_mixture_inputs(tmp_path)
    output = mixture.main(["--data_root", str(tmp_path)])
    assert output == tmp_path / "all_data.json"
    assert json.loads(output.read_text()) == MIXTURE["output"]["all_data.json"]
    assert "python -m mma.train --do_pretrain" in capsys.readouterr().out


def test_a_broken_entry_is_named(tmp_path: Path) -> None:
    save_mixture_inputs(tmp_path)
    broken = MIXTURE["inputs"]["detail_23k.json"] + [{"image": "x.jpg", "conversations": [{"from": "human"}]}]
    (tmp_path / "detail_23k.json").write_text(json.dumps(broken))
    with pytest.raises(BadSampleError, match=r"detail_23k\.json, row 1"):
        mixture.main(["--data_root", str(tmp_path)])
    assert not (tmp_path / "all_data.json").exists()


def test_coco_images_are_found_under_both_names(tmp_path: Path) -> None:
    (tmp_path / "all_data.json").write_text(json.dumps(INSTRUCT["all_data"]))
    rows, folder = read_mixture(tmp_path)
    names = {row["id"]: row.get("image") for row in rows}
    assert folder == tmp_path / "images"
    assert names["gpt4_0"] == "train2014/COCO_train2014_000000000011.jpg"
    assert names["2"] == "train/2/image.png"
    assert names["alpaca_0"] is None
    (folder / "train2014").mkdir(parents=True)
    (folder / "train2014" / "000000000011.jpg").touch()
    assert {row["id"]: row.get("image") for row in read_mixture(tmp_path)[0]}["gpt4_0"] == "train2014/000000000011.jpg"


def test_coco_may_lie_behind_a_link(tmp_path: Path) -> None:
    save_mixture_inputs(tmp_path)
    mixture.main(["--data_root", str(tmp_path)])
    elsewhere = tmp_path / "elsewhere" / "coco"
    elsewhere.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(elsewhere / "COCO_train2014_000000000011.jpg")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train2014").symlink_to(elsewhere)
    rows, folder = read_mixture(tmp_path)
    name = next(row["image"] for row in rows if row["id"] == "gpt4_0")
    assert load_image(folder, name).size == (8, 8)


# The data set


def dataset_of(tmp_path: Path, tokenizer: Any, **options: Any) -> LavinDataset:
    save_problems(tmp_path, IMAGES)
    data = read_split(tmp_path, "train")
    settings = {"max_length": 511, "image_folder": data.image_folder} | options
    return LavinDataset(training_rows(data, "QCM-ALE"), tokenizer, lavin_processor(28), **settings)


def test_batches_mix_samples_with_and_without_image(tmp_path: Path, tokenizer: Any) -> None:
    dataset = dataset_of(tmp_path, tokenizer)
    assert len(dataset) == 18
    assert [length > 0 for length in dataset.modality_lengths] == [bool(i) for i in TOKENS["runs"][0]["indicators"]]
    tokenizer.model_max_length = 511
    batch = DataCollatorForSupervisedDataset(tokenizer)([dataset[0], dataset[1]])  # text, image
    assert batch["images"].shape == (2, 3, 28, 28)
    assert batch["images"][0].abs().max() == 0
    assert batch["images"][1].abs().max() > 0
    assert (batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(dim=1).tolist() == [0, 1]
    count = TOKENS["runs"][0]["n_label"]
    assert (batch["labels"] != IGNORE_INDEX).sum(dim=1).tolist() == count[:2]


def test_splits_without_images_of_their_own_find_them(tmp_path: Path) -> None:
    save_problems(tmp_path, IMAGES)
    splits = json.loads((tmp_path / "pid_splits.json").read_text())
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits | {"minitrain": splits["train"][:2]}))
    data = read_split(tmp_path, "minitrain")
    assert (data.image(0), data.image(1)) == (None, "train/2/image.png")
    assert load_image(data.image_folder, data.image(1)).size == (60, 40)
    assert read_split(tmp_path, "train").image(1) == "2/image.png"


def test_a_sample_without_target_is_refused_or_listed(tmp_path: Path, tokenizer: Any) -> None:
    dataset = dataset_of(tmp_path, tokenizer, max_length=40)
    with pytest.raises(NoTargetError, match=r"problems.json, row 0 \(id '1'\).*--max_seq_len"):
        dataset[0]
    listed = tmp_path / "skipped.jsonl"
    dataset = LavinDataset(
        dataset.rows,
        tokenizer,
        lavin_processor(28),
        image_folder=tmp_path / "images" / "train",
        max_length=60,
        on_bad_sample="skip",
        skipped_file=listed,
    )
    assert (dataset[0]["labels"] != IGNORE_INDEX).any()
    assert json.loads(listed.read_text().splitlines()[0])["id"] == "1"


def test_what_is_wrong_with_the_files_is_said(tmp_path: Path) -> None:
    save_problems(tmp_path)
    with pytest.raises(BadSampleError, match="no problems in split 'minitest'"):
        read_split(tmp_path, "minitest")
    with pytest.raises(FlagError, match="--prompt_format QCM-B"):
        training_rows(read_split(tmp_path, "train"), "QCM-B")
    problems = dict(PROMPTS["problems"])
    problems["3"] = problems["3"] | {"answer": 7}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(BadSampleError, match="problem '3': the answer is 7, but there are 2 choices"):
        training_rows(read_split(tmp_path, "train"), "QCM-A")
    with pytest.raises(BadSampleError, match="give more by --options"):
        training_rows(read_split(tmp_path, "val"), "QCM-A", options="A")
