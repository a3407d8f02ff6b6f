"""The images of what was kept: fading, words, the program on a tiny sparse model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from dynamic import visualize
from dynamic.figures import KeptImage, TextSegment, Word, draw_sheet, fade_dropped, page
from dynamic.inspection import DecisionLog
from llava.errors import CheckpointError, FlagError
from llava.eval.answering.loading import load_model
from tests.dynamic.sparse_checkpoint import write_sparse_checkpoint
from tests.golden import golden_dir

IMAGE = golden_dir("llava") / "data" / "images" / "im0.png"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_checkpoint(tmp_path_factory.mktemp("sparse") / "tiny-sparse-v1")


def arguments(model: Path, output: Path, *more: str) -> list[str]:
    words = ["--model-path", str(model), "--image-file", str(IMAGE), "--output-dir", str(output), "--device", "cpu"]
    return [*words, "--query", "Is it red?", "--temperature", "0", "--max_new_tokens", "8", *more]


def test_dropped_patches_fade_and_kept_ones_stay() -> None:
    image = Image.effect_noise((40, 20), 80).convert("RGB").point(lambda value: value // 2)
    faded = fade_dropped(KeptImage(image, (2, 4), {0, 5}))
    for index in range(8):
        row, column = divmod(index, 4)
        box = (column * 10, row * 10, column * 10 + 10, row * 10 + 10)
        changed = ImageChops.difference(image.crop(box), faded.crop(box)).getbbox() is not None
        assert changed == (index not in {0, 5})


def test_a_patch_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="patch 8 lies outside a grid of 2 x 4"):
        fade_dropped(KeptImage(Image.new("RGB", (8, 4)), (2, 4), [1, 8]))


def test_page_and_sheet_show_words_and_escape_them() -> None:
    segment = TextSegment("Answer", [Word("<b>", True), Word(" gone", False), Word("\nnext", True)])
    image = KeptImage(Image.new("RGB", (8, 8), "blue"), (2, 2), [0])
    text = page("Q & A", [image], [segment])
    assert "Q &amp; A" in text
    assert '<span class="kept">&lt;b&gt;</span><span class="dropped"> gone</span>' in text
    assert "Answer: 2 of 3 tokens kept" in text
    assert "1 of 4 patches kept (25%)" in text
    with_words, without = (draw_sheet([image], segments, side=64) for segments in ([segment], []))
    assert with_words.height > without.height
    long = TextSegment("Answer", [Word(" word", index % 2 == 0) for index in range(60)])
    assert draw_sheet([image], [long], side=64).height > with_words.height


def test_the_program_shows_what_the_model_kept(
    sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = visualize.main(arguments(sparse, tmp_path / "kept"))
    patches = load_model(str(sparse), device="cpu").patches_per_image
    printed = capsys.readouterr().out
    assert f"{patches // 2} of {patches} patches kept" in printed
    assert "Answer, all but the last token: " in printed
    assert Image.open(folder / "kept.png").size[0] > 600
    text = (folder / "kept.html").read_text(encoding="utf-8")
    assert text.count("<img") == 2
    assert 'class="dropped"' in text
    # The words of the instruction are the question's own, in order.
    assert "".join(text.partition('class="words">')[2].partition("</p>")[0].split()).count("red") == 1


def with_feature(sparse: Path, folder: Path, feature: str) -> Path:
    """The checkpoint with another `--mm_vision_select_feature`."""
    shutil.copytree(sparse, folder)
    config = json.loads((folder / "config.json").read_text()) | {"mm_vision_select_feature": feature}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_class_token_is_no_patch(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tower's class token is kept, patch i is token i + 1 of the image."""
    shown, logs, kept_images = [], [], visualize.kept_images

    def watched(log: DecisionLog, *others: Any) -> list[KeptImage]:
        logs.append(log)
        shown.extend(kept_images(log, *others))
        return shown

    monkeypatch.setattr(visualize, "kept_images", watched)
    model = with_feature(sparse, tmp_path / "tiny-sparse-v1", "cls_patch")
    visualize.main(arguments(model, tmp_path / "kept"))
    side = load_model(str(model), device="cpu").model.get_vision_tower().num_patches_per_side
    (tokens,) = logs[0].prompts[0].images(0)
    assert shown[0].grid == (side, side)
    assert sorted(shown[0].kept) == [index - 1 for index in sorted(tokens.tolist()) if index > 0]
    assert len(shown[0].kept) in (len(tokens), len(tokens) - 1)


def test_class_tokens_alone_are_refused(sparse: Path, tmp_path: Path) -> None:
    model = with_feature(sparse, tmp_path / "tiny-sparse-v1", "cls_every_1")
    with pytest.raises(CheckpointError, match="cls_every_1 of this model: its tokens are not patches"):
        visualize.main(arguments(model, tmp_path / "kept"))


def test_a_dense_model_and_beams_are_refused(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a dense model"):
        visualize.main(arguments(golden_dir("llava") / "tiny-llava-v1.5", tmp_path))
    with pytest.raises(FlagError, match="--num_beams 2"):
        visualize.main(arguments(sparse, tmp_path, "--num_beams", "2"))
