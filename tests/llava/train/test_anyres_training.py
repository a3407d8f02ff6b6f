"""Training and answering with images as tiles: the newline vector, the lengths, and batches of any size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.convert.original import export_original
from llava.data.images import load_image
from llava.errors import BadSampleError, FlagError
from llava.eval.answering.answers import Task
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import load_model
from llava.eval.answering.runner import answer_batch, load_images, make_prompt
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model
from llava.model.splice import count_targets
from llava.train.run import Run
from llava.train.train import build_run, main, parse_args
from tests.golden import golden_dir
from tests.llava.train.test_training import BASE, LLAVA, command_line, losses

PINPOINTS = "[(28, 56), (56, 28), (56, 56)]"
VICUNA = LLAVA / "tiny-vicuna"
LORA = {"lora_enable": True, "lora_r": 4}
IMAGES = golden_dir("llava") / "data" / "images"


def anyres(output: Path, merge_type: str, **changes: Any) -> list[str]:
    settings = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "mm_patch_merge_type": merge_type}
    return command_line(output, **(settings | {"model_name_or_path": VICUNA, "save_strategy": "no"} | changes))


def loss_of(model: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).loss


def batch_of(run: Run, rows: int = 4) -> dict[str, Any]:
    return run.trainer.data_collator([run.dataset[index] for index in range(rows)])


@pytest.mark.parametrize("options", [{}, LORA, {"tune_mm_mlp_adapter": True}], ids=["full", "lora", "projector"])
@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_checkpoint_is_the_trained_model(merge_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    run = build_run(parse_args(anyres(tmp_path, merge_type, **options)))
    model = bare_model(run.model)
    newline = getattr(model.get_model(), "image_newline", None)
    assert (newline is not None) == (merge_type == "spatial_unpad")
    before = None if newline is None else newline.detach().clone()
    batch = batch_of(run)
    assert isinstance(batch["images"], list)
    assert {image.shape[1:] for image in batch["images"]} == {(3, 28, 28)}
    assert len({len(image) for image in batch["images"]}) > 1, "images of different shapes have different tiles"
    at_first = loss_of(model, batch)
    run.trainer.train()
    run.trainer.save_model()
    assert newline is None or not torch.equal(newline, before), "the newline vector is trained"
    base = None if not options else str(VICUNA)
    _, loaded, _, _ = load_pretrained_model(str(tmp_path), base, device="cpu")
    assert loaded.config.image_aspect_ratio == "anyres"
    assert [tuple(size) for size in loaded.config.image_grid_pinpoints] == [(28, 56), (56, 28), (56, 56)]
    expected = loss_of(model, batch)
    torch.testing.assert_close(loss_of(loaded, batch), expected, rtol=0, atol=1e-5)
    assert (at_first - expected).abs() > 0.01
    if newline is not None:
        torch.testing.assert_close(loaded.get_model().image_newline, newline, rtol=0, atol=0)
        with torch.no_grad():
            loaded.get_model().image_newline += 1
        assert (loss_of(loaded, batch) - expected).abs() > 1e-4, "the newline vector is used"


@pytest.fixture
def memory_of_nan() -> Iterator[None]:
    """New memory holds NaN, not what happened to be there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("memory_of_nan")
def test_export_to_the_original_layout(tmp_path: Path) -> None:
    """The base has no `image_newline`: until the checkpoint's is read, it is new memory."""
    main(anyres(tmp_path / "run", "spatial_unpad", **LORA))
    exported = export_original(tmp_path / "run", tmp_path / "original")
    _, ours, _, _ = load_pretrained_model(str(tmp_path / "run"), device="cpu")
    config = exported / "config.json"
    config.write_text(config.read_text().replace('"tiny-clip"', f'"{LLAVA / "tiny-clip"}"'))
    _, theirs, _, _ = load_pretrained_model(str(exported), str(VICUNA), device="cpu")
    assert torch.equal(ours.get_model().image_newline, theirs.get_model().image_newline)


def test_stage_1_file_without_newline(tmp_path: Path) -> None:
    """Upstream's projector files never hold the vector; ours do, and give it to the next stage."""
    stage_1 = LLAVA / "tiny-llava-pretrain" / "mm_projector.bin"
    run = build_run(parse_args(anyres(tmp_path / "a", "spatial_unpad", pretrain_mm_mlp_adapter=stage_1)))
    assert run.model.get_model().image_newline.std() > 0
    main(anyres(tmp_path / "b", "spatial_unpad", tune_mm_mlp_adapter=True, pretrain_mm_mlp_adapter=stage_1))
    ours = tmp_path / "b" / "mm_projector.safetensors"
    first = build_run(parse_args(anyres(tmp_path / "c", "spatial_unpad", pretrain_mm_mlp_adapter=ours, seed=1)))
    second = build_run(parse_args(anyres(tmp_path / "c", "spatial_unpad", pretrain_mm_mlp_adapter=ours, seed=2)))
    assert torch.equal(first.model.get_model().image_newline, second.model.get_model().image_newline)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Also where the longest samples are cut in the middle of their answer."""
    shared = {"max_steps": 2, "train_sampling_strategy": "sequential", "model_max_length": 95}
    main(anyres(tmp_path / "once", "spatial_unpad", per_device_train_batch_size=4, **shared))
    main(
        anyres(
            tmp_path / "steps", "spatial_unpad", per_device_train_batch_size=1, gradient_accumulation_steps=4, **shared
        )
    )
    assert losses(tmp_path / "once") == pytest.approx(losses(tmp_path / "steps"), abs=2e-5)


@pytest.mark.parametrize("limit", [60, 80, 95, None])
@pytest.mark.parametrize("merge_type", ["flat", "spatial_unpad"])
def test_targets_are_counted_without_features(merge_type: str, limit: int | None, tmp_path: Path) -> None:
    run = build_run(parse_args(anyres(tmp_path, merge_type)))
    model = run.model
    model.config.tokenizer_model_max_length = limit
    batch = batch_of(run, len(run.dataset))
    lengths = model.image_lengths(batch["images"], batch["image_sizes"])
    assert len(set(lengths)) > 2
    inputs = model.build_inputs(**batch)
    expected = int((inputs.labels[:, 1:] != IGNORE_INDEX).sum())
    assert int(count_targets(batch["input_ids"], batch["labels"], lengths, limit)) == expected


def test_answer_behind_the_tiles_is_refused(tmp_path: Path) -> None:
    """A length that holds the prompt with one image of the crop size, and not with tiles."""
    limit = 85
    build_run(parse_args(command_line(tmp_path / "whole", model_max_length=limit))).dataset[2]
    run = build_run(parse_args(anyres(tmp_path / "tiles", "flat", model_max_length=limit)))
    with pytest.raises(BadSampleError, match=rf"row 2 .*first answer begins at position \d+, but .* cut at {limit}"):
        run.dataset[2]


REFUSED = {
    "no pinpoints": ({"image_aspect_ratio": "anyres"}, "needs --image_grid_pinpoints"),
    "no tower": (
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "vision_tower": ""},
        "needs --vision_tower",
    ),
    "pinpoints alone": ({"image_grid_pinpoints": PINPOINTS}, "belongs to --image_aspect_ratio anyres"),
    "merge alone": ({"mm_patch_merge_type": "spatial"}, "only --image_aspect_ratio anyres"),
    "unknown merge": ({"mm_patch_merge_type": "diagonal"}, "known values"),
    "class token": (
        {
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": PINPOINTS,
            "mm_patch_merge_type": "spatial",
            "mm_vision_select_feature": "cls_patch",
        },
        "no place for the class token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_options(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises(FlagError, match=message):
        parse_args(command_line(tmp_path, **options))


def test_pinpoints_that_are_no_whole_tiles(tmp_path: Path) -> None:
    args = anyres(tmp_path, "flat", image_grid_pinpoints="[(28, 60)]")
    with pytest.raises(FlagError, match="multiples of 28"):
        build_run(parse_args(args))


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_batched_answers_equal_single_ones(merge_type: str, tmp_path: Path) -> None:
    main(anyres(tmp_path / "run", merge_type, model_name_or_path=BASE))
    loaded = load_model(str(tmp_path / "run"), device="cpu")
    names = [("im0.png",), (), ("im3.png",), ("im1.png", "im2.png")]
    tasks = [
        Task(number, f"{'What is shown here and there? ' * number}", "", images, f"q:{number}")
        for number, images in enumerate(names)
    ]
    options = GenerationOptions(temperature=0, max_new_tokens=10)
    prompts = [make_prompt(str(task.question_id), task, loaded, "vicuna_v1") for task in tasks]
    shown = [load_images(task, loaded, lambda name, where: load_image(IMAGES, name, where)) for task in tasks]
    together = answer_batch(prompts, shown, loaded, options)
    for prompt, row in zip(prompts, shown, strict=True):
        assert answer_batch([prompt], [row], loaded, options)[prompt.key] == together[prompt.key]
    turned = [shown[2], *shown[1:2], shown[0], shown[3]]
    assert answer_batch(prompts, turned, loaded, options) != together, "the images must matter"
