"""What the `config.json` of a base says holds unless a flag is given; a given flag that differs is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import FlagError
from llava.model.checkpoint import bare_model
from llava.model.formats import inspect_checkpoint, read_tensors
from llava.runtime.weights.weight_files import weight_files
from llava.train.arguments import parse_args
from llava.train.base_settings import SETTINGS
from llava.train.options import RunArguments
from llava.train.train import build_run
from llava.train.train import main as train
from tests.golden import golden_dir

LLAVA = golden_dir("llava")
PINPOINTS = [[28, 56], [56, 28]]
"""The tower of the tiny model has 28 pixels."""

# Of each setting: what the base says, which no option has as its default, and a flag that differs from it.
SAID: dict[str, tuple[Any, Any]] = {
    "mm_vision_select_layer": (-2, -1),
    "mm_vision_select_feature": ("cls_patch", "patch"),
    "mm_image_normalization": ("imagenet", "tower"),
    "mm_patch_merge_type": ("spatial_unpad", "flat"),
    "mm_use_im_start_end": (True, False),
    "mm_use_im_patch_token": (False, True),
    "image_aspect_ratio": ("pad", "square"),
    "image_grid_pinpoints": (PINPOINTS, "[(56, 56)]"),
}
NEEDED = {
    "mm_patch_merge_type": {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS},
    "image_grid_pinpoints": {"image_aspect_ratio": "anyres"},
}
"""What a base must say in addition."""


def base_of(folder: Path, **config: Any) -> Path:
    """The tiny LLaVA with other words in its `config.json`."""
    shutil.copytree(LLAVA / "tiny-llava-v1.5", folder)
    content = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": str(LLAVA / "tiny-clip")}
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


def options(base: Path, output: Path, **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        "model_name_or_path": base,
        "data_path": LLAVA / "data" / "finetune.json",
        "image_folder": LLAVA / "data" / "images",
        "version": "v1",
        "output_dir": output,
        "lora_enable": True,
        "lora_r": 4,
        "use_cpu": True,
        "report_to": "none",
    }
    return [word for name, value in (values | changes).items() for word in (f"--{name}", str(value))]


def add_newline(base: Path) -> torch.Tensor:
    """Put the vector that ends a row of tiles into the weights of a base."""
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(inspect_checkpoint(base).weights):
        weights |= read_tensors(path)
    weights["model.image_newline"] = torch.randn(weights["model.norm.weight"].shape)
    for path in base.glob("pytorch_model*"):
        path.unlink()
    torch.save(weights, base / "pytorch_model.bin")
    return weights["model.image_newline"]


def value_of(args: RunArguments, name: str) -> Any:
    return getattr(getattr(args, SETTINGS[name].part), name)


def test_every_setting_has_a_case() -> None:
    assert SAID.keys() | {"mm_projector_type"} == SETTINGS.keys()


@pytest.mark.parametrize("name", SAID)
def test_a_setting_of_the_base_holds_in_a_run_and_is_recorded(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, other = SAID[name]
    base = base_of(tmp_path / "base", **{name: said}, **NEEDED.get(name, {}))
    newline = add_newline(base) if name == "mm_patch_merge_type" else None
    run = build_run(parse_args(options(base, tmp_path / "out")))
    config = bare_model(run.model).config
    recorded = getattr(config, name)
    assert [list(size) for size in recorded] == said if name == "image_grid_pinpoints" else recorded == said
    if newline is not None:
        assert torch.equal(bare_model(run.model).get_model().image_newline, newline)
    printed = capsys.readouterr().out
    assert "was trained with" not in printed
    kept = next(line for line in printed.splitlines() if line.startswith("settings"))
    assert f"of {base}: " in kept
    assert f"{name} " in kept
    # The same flag given: it wins, and the difference is said.
    run = build_run(parse_args(options(base, tmp_path / "other", **{name: other})))
    assert str(value_of(run.args, name)) == str(other)
    assert f"--{name} {other}: {base} was trained with {said}" in capsys.readouterr().out


def test_the_projector_of_the_base_holds_and_another_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    args = parse_args(options(base, tmp_path / "out"))
    assert args.model.mm_projector_type == "mlp2x_gelu"
    with pytest.raises(FlagError, match=r"'linear'.*'mlp2x_gelu' projector"):
        build_run(parse_args(options(base, tmp_path / "other", mm_projector_type="linear")))


def test_what_a_base_does_not_say_has_the_value_by_which_it_is_evaluated(tmp_path: Path) -> None:
    """`--mm_use_im_patch_token` is True by default, and a LLaVA without a word of it has no such token."""
    base = base_of(tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    for name in ("mm_use_im_patch_token", "mm_use_im_start_end", "mm_patch_merge_type"):
        content.pop(name)
    (base / "config.json").write_text(json.dumps(content))
    args = parse_args(options(base, tmp_path / "out"))
    assert args.model.mm_use_im_patch_token is False
    assert args.model.mm_patch_merge_type == "flat"


def test_a_plain_language_model_leaves_the_defaults(tmp_path: Path) -> None:
    args = parse_args(options(LLAVA / "tiny-vicuna", tmp_path / "out", vision_tower=LLAVA / "tiny-clip"))
    assert args.base.source is None
    assert {name: value_of(args, name) for name in ("mm_vision_select_layer", "image_aspect_ratio")} == {
        "mm_vision_select_layer": -1,
        "image_aspect_ratio": "square",
    }


def test_settings_of_the_projectors_run_hold_on_a_plain_language_model(tmp_path: Path) -> None:
    stage = LLAVA / "tiny-llava-pretrain"
    words = options(
        LLAVA / "tiny-vicuna",
        tmp_path / "out",
        vision_tower=LLAVA / "tiny-clip",
        pretrain_mm_mlp_adapter=stage / "mm_projector.bin",
    )
    args = parse_args(words)
    recorded = json.loads((stage / "config.json").read_text())
    for name in ("mm_vision_select_layer", "mm_projector_type", "mm_use_im_patch_token"):
        assert value_of(args, name) == recorded[name]
    assert args.base.source == str(stage)


def test_the_flag_of_no_tower_trains_on_text_and_keeps_the_words_on_images(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", mm_use_im_start_end=True)
    rows = [{"id": 0, "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I"}]}] * 2
    (tmp_path / "text.json").write_text(json.dumps(rows))
    words = options(
        base,
        tmp_path / "out",
        data_path=tmp_path / "text.json",
        vision_tower="none",
        max_steps=1,
        freeze_mm_mlp_adapter=True,
    )
    run = build_run(parse_args(words))
    assert bare_model(run.model).get_vision_tower() is None
    config, before = bare_model(run.model).config, json.loads((base / "config.json").read_text())
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token", "image_aspect_ratio", "mm_vision_select_layer"):
        assert getattr(config, name) == before[name]
    train(words)
