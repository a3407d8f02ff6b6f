"""A vision tower that was trained survives the next step, whatever it is; one that is named is found and checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.errors import CheckpointError, FlagError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model
from llava.model.full_weights import write_full_weights
from llava.model.multimodal_encoder.builder import tower_at
from llava.train.train import build_run, main, parse_args
from tests.golden import golden_dir
from tests.llava.model.towers import siglip
from tests.llava.train.test_training import command_line

LLAVA = golden_dir("llava")
CLIP, VICUNA = LLAVA / "tiny-clip", LLAVA / "tiny-vicuna"
LORA = {"lora_enable": True, "lora_r": 4}

# A step on a base with a trained tower: its options, and whether its checkpoint needs that base.
STEPS: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": (LORA, True),
    "lora with the tower's bare name": (LORA | {"vision_tower": "vision_tower"}, True),
    "full": ({}, False),
    "full with the tower's bare name": ({"vision_tower": "vision_tower"}, False),
    "projector": ({"tune_mm_mlp_adapter": True}, True),
    "hydralora": ({"use_lora": True, "lora_rank": 4, "lora_alpha": 8}, True),
    "lora, projector frozen": (LORA | {"freeze_mm_mlp_adapter": True}, True),
}


def words(output: Path, **changes: Any) -> list[str]:
    return command_line(output, **({"max_steps": 1, "save_strategy": "no", "logging_steps": 1} | changes))


def tower_of(folder: Path, base: Path | None = None) -> Tensor:
    """All weights of the tower that a checkpoint is loaded with."""
    model = load_pretrained_model(str(folder), base and str(base), device="cpu", torch_dtype=torch.float32)[1]
    return torch.cat([weight.detach().flatten() for weight in model.get_vision_tower().parameters()])


def original() -> Tensor:
    """All weights of the tower before any training."""
    tower = tower_at(str(CLIP), SimpleNamespace(mm_vision_select_layer=-2))
    tower.load_model(torch.float32)
    return torch.cat([weight.detach().flatten() for weight in tower.parameters()])


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained its tower."""
    return main(words(tmp_path_factory.mktemp("first") / "A", unfreeze_mm_vision_tower=True, mm_vision_tower_lr=1e-2))


@pytest.fixture(scope="module")
def trained(first: Path) -> Tensor:
    weights = tower_of(first)
    assert not torch.equal(weights, original())
    return weights


@pytest.mark.parametrize("step", STEPS)
def test_the_next_step_keeps_it(
    step: str,
    first: Path,
    trained: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes, needs_base = STEPS[step]
    folder = main(words(tmp_path / "out", model_name_or_path=first, **changes))
    printed = capsys.readouterr().out
    assert (f"--vision_tower {CLIP} is not used: {first} has its own trained tower" in printed) == (
        "vision_tower" not in changes
    )
    monkeypatch.chdir(tmp_path)
    assert torch.equal(tower_of(folder, first if needs_base else None), trained)
    config = config_of(folder)
    assert config["mm_vision_tower_from"] == str(CLIP)
    if needs_base:  # a reference, which costs nothing
        assert config["mm_vision_tower"] == str(first / "vision_tower")
        assert len(config["mm_vision_tower_sha256"]) == 64
        assert not (folder / "vision_tower").exists()
    else:
        assert config["mm_vision_tower"] == "vision_tower"
        shutil.move(folder, tmp_path / "moved")
        assert torch.equal(tower_of(tmp_path / "moved"), trained)


def test_training_it_further_begins_with_it(first: Path, trained: Tensor, tmp_path: Path) -> None:
    run = build_run(parse_args(words(tmp_path / "out", model_name_or_path=first, unfreeze_mm_vision_tower=True)))
    tower = bare_model(run.model).get_vision_tower()
    assert torch.equal(torch.cat([weight.detach().flatten() for weight in tower.parameters()]), trained)
    run.trainer.train()
    run.trainer.save_model()
    assert not torch.equal(tower_of(tmp_path / "out"), trained)
    assert config_of(tmp_path / "out")["mm_vision_tower_from"] == str(CLIP)


def test_text_rows_without_the_flag_keep_it(first: Path, trained: Tensor, tmp_path: Path) -> None:
    rows = [{"id": 0, "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I"}]}] * 2
    (tmp_path / "text.json").write_text(json.dumps(rows))
    given = words(tmp_path / "out", model_name_or_path=first, data_path=tmp_path / "text.json")
    place = given.index("--vision_tower")
    folder = main(given[:place] + given[place + 2 :])
    assert torch.equal(tower_of(folder), trained)
    with pytest.raises(FlagError, match=r"--vision_tower none: .* has a vision tower of its own"):
        parse_args(words(tmp_path / "other", model_name_or_path=first, vision_tower="none"))


@pytest.fixture
def lora(first: Path, tmp_path: Path) -> Path:
    """A LoRA on the base with the trained tower, by the published script's flags."""
    return main(words(tmp_path / "lora", model_name_or_path=first, **LORA))


def test_merging_carries_it(lora: Path, first: Path, trained: Tensor, tmp_path: Path) -> None:
    merged = write_full_weights(lora, tmp_path / "merged", str(first))
    assert torch.equal(tower_of(merged), trained)
    assert config_of(merged)["mm_vision_tower"] == "vision_tower"
    assert config_of(merged).get("mm_vision_tower_sha256") is None
    assert torch.equal(tower_of(main(words(tmp_path / "next", model_name_or_path=merged))), trained)


def test_the_reference_follows_the_base_and_knows_another_tower(
    lora: Path, first: Path, trained: Tensor, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / "base"
    shutil.copytree(first, moved)
    config = config_of(lora) | {"mm_vision_tower": "/gone/A/vision_tower"}
    (lora / "config.json").write_text(json.dumps(config))
    assert torch.equal(tower_of(lora, moved), trained)
    path = moved / "vision_tower" / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name].view(-1)[-1] += 1e-3
    save_file(weights, path, {"format": "pt"})
    (moved / "checkpoint_files.json").unlink()
    with pytest.raises(CheckpointError, match=r"SHA-256 .*mm_vision_tower_sha256"):
        tower_of(lora, moved)


def with_width(folder: Path) -> Path:
    """The tower with blocks of another number."""
    shutil.copytree(CLIP, folder)
    config = json.loads((folder / "config.json").read_text())
    inner = config.get("vision_config", config)
    inner["num_hidden_layers"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("make", [siglip, with_width], ids=["another kind", "another size"])
def test_another_kind_of_tower_is_refused_unless_it_is_really_asked_for(
    make: Callable[[Path], Path], first: Path, tmp_path: Path
) -> None:
    other = make(tmp_path / "tower")
    with pytest.raises(FlagError, match="--replace_vision_tower True to begin with the other one"):
        parse_args(words(tmp_path / "out", model_name_or_path=first, vision_tower=other))


def test_the_tower_is_replaced_on_demand(first: Path, trained: Tensor, tmp_path: Path) -> None:
    asked = {"model_name_or_path": first, "replace_vision_tower": True}
    folder = main(words(tmp_path / "out", **asked, **LORA))
    assert not torch.equal(tower_of(folder, first), trained)
    assert config_of(folder)["mm_vision_tower"] == str(CLIP)
    given = words(tmp_path / "other", **asked)
    place = given.index("--vision_tower")
    with pytest.raises(FlagError, match="--replace_vision_tower True: needs --vision_tower"):
        parse_args(given[:place] + given[place + 2 :])


def test_the_first_tower_need_not_be_there_any_more(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name in the script is enough; another path that leads nowhere is an error."""
    base = tmp_path / "base"
    shutil.copytree(first, base)
    config = config_of(base) | {"mm_vision_tower_from": "/gone/clip"}
    (base / "config.json").write_text(json.dumps(config))
    for name in ("/gone/clip", "owner/not-in-the-cache"):
        args = parse_args(words(tmp_path / "out", model_name_or_path=base, vision_tower=name))
        assert args.model.vision_tower == str(base / "vision_tower")
        assert f"--vision_tower {name} is not used (nor looked at: it is not here)" in str(args.base.remark)
    with pytest.raises(CheckpointError, match="no vision tower '/gone/typo'"):
        parse_args(words(tmp_path / "out", model_name_or_path=base, vision_tower="/gone/typo"))


def test_the_run_record_of_older_folders_tells_the_first_tower(first: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(first, base)
    config = config_of(base)
    config.pop("mm_vision_tower_from")
    (base / "config.json").write_text(json.dumps(config))
    record = json.loads((base / "run.json").read_text())
    record["arguments"]["model"]["vision_tower"] = "/gone/clip"
    (base / "run.json").write_text(json.dumps(record))
    (base / "checkpoint_files.json").unlink()
    args = parse_args(words(tmp_path / "out", model_name_or_path=base, vision_tower="/gone/clip"))
    assert args.model.vision_tower == str(base / "vision_tower")


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA on a language model, started in a folder that the tower's path is relative to."""
    shutil.copytree(CLIP, tmp_path / "models" / "clip")
    monkeypatch.chdir(tmp_path / "models")
    folder = main(words(tmp_path / "runs" / "lora", model_name_or_path=VICUNA, vision_tower="./clip", **LORA))
    monkeypatch.chdir(tmp_path.parent)
    return folder


def test_a_named_tower_resolves_from_any_folder(named: Path, tmp_path: Path) -> None:
    config = config_of(named)
    assert config["mm_vision_tower"] == str(tmp_path / "models" / "clip")
    assert torch.equal(tower_of(named, VICUNA), original())
    merged = write_full_weights(named, tmp_path / "merged", str(VICUNA))
    assert config_of(merged)["mm_vision_tower_sha256"] == config["mm_vision_tower_sha256"]
    # It may move along with the checkpoint.
    shutil.move(tmp_path / "models" / "clip", tmp_path / "runs" / "clip")
    assert torch.equal(tower_of(named, VICUNA), original())


def test_a_named_tower_that_was_replaced_is_refused(named: Path, tmp_path: Path) -> None:
    path = tmp_path / "models" / "clip" / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    weights["vision_model.post_layernorm.bias"][-1] += 1e-3
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"config\.json.*SHA-256.*put the tower of then in its place"):
        tower_of(named, VICUNA)
    config = config_of(named)
    config.pop("mm_vision_tower_sha256")
    (named / "config.json").write_text(json.dumps(config))
    (named / "checkpoint_files.json").unlink()
    tower_of(named, VICUNA)


def test_the_same_weights_in_other_files_are_the_same_tower(named: Path, tmp_path: Path) -> None:
    """The digest is of the values: not of the format of a file, nor of the dtype that a program wants."""
    folder = tmp_path / "models" / "clip"
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    half = {name: value.to(torch.float16).float() for name, value in weights.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="SHA-256"):
        tower_of(named, VICUNA)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(tower_of(named, VICUNA), original())
    loaded = load_pretrained_model(str(named), str(VICUNA), device="cpu", torch_dtype=torch.float16)[1]
    assert loaded.get_vision_tower().dtype == torch.float16


def test_a_base_whose_named_tower_was_replaced_is_refused_unless_the_flag_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(CLIP, tmp_path / "clip")
    base = main(words(tmp_path / "base", vision_tower=tmp_path / "clip"))
    config = config_of(base) | {"mm_vision_tower_sha256": "0" * 64}
    (base / "config.json").write_text(json.dumps(config))
    given = words(tmp_path / "out", model_name_or_path=base, vision_tower=tmp_path / "clip")
    build_run(parse_args(given))
    assert f"--vision_tower {tmp_path / 'clip'}: its weights have the SHA-256" in capsys.readouterr().out
    place = given.index("--vision_tower")
    with pytest.raises(CheckpointError, match="the base was trained with"):
        build_run(parse_args(given[:place] + given[place + 2 :]))


def test_a_tower_that_was_put_into_the_weights_is_read(first: Path, trained: Tensor, tmp_path: Path) -> None:
    """By another program, as LLaVA-1.6's folders are; the record of files is that of the folder before."""
    folder = tmp_path / "inside"
    shutil.copytree(first, folder, ignore=shutil.ignore_patterns("vision_tower", "run.json", "trainer_state.json"))
    tower = load_file(first / "vision_tower" / "model.safetensors")
    inside = {f"model.vision_tower.vision_tower.{name}": value for name, value in tower.items()}
    save_file(load_file(folder / "model.safetensors") | inside, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"mm_vision_tower": str(CLIP)}))
    assert torch.equal(tower_of(folder), trained)
    next_one = main(words(tmp_path / "next", model_name_or_path=folder, **LORA))
    assert torch.equal(tower_of(next_one, folder), trained)
    with pytest.raises(FlagError, match="has a vision tower of its own in its weights"):
        build_run(parse_args(words(tmp_path / "text", model_name_or_path=folder, vision_tower="none")))
    # Weights that were cut are noticed as before.
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        tower_of(folder)
