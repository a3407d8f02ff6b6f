"""The programs that rewrite weights: merging, consolidating, extracting a projector, differences from a base."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from llava.errors import CheckpointError, FlagError
from llava.model import apply_delta, consolidate, make_delta
from llava.model.builder import load_pretrained_model
from llava.model.formats import inspect_checkpoint, read_projector, read_tensors
from llava.runtime.weights.weight_files import weight_files
from scripts import extract_mm_projector, merge_lora_weights
from tests.golden import golden_dir

LLAVA = golden_dir("llava")
FULL, BASE, LORA = LLAVA / "tiny-llava-v1.5", LLAVA / "tiny-vicuna", LLAVA / "tiny-llava-lora"
ROUTED = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"
PROGRAMS = {
    "scripts/extract_mm_projector.py": extract_mm_projector,
    "scripts/merge_lora_weights.py": merge_lora_weights,
    "llava/model/consolidate.py": consolidate,
    "llava/model/apply_delta.py": apply_delta,
    "llava/model/make_delta.py": make_delta,
}


def flags() -> dict[str, list[dict[str, Any]]]:
    return json.loads((LLAVA / "flags.json").read_text())["cli"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_flags_are_upstreams(name: str) -> None:
    actions: list[argparse.Action] = PROGRAMS[name].build_parser()._actions
    ours = {tuple(action.option_strings): action.dest for action in actions if action.dest != "help"}
    assert ours == {tuple(flag["flags"]): flag["dest"] for flag in flags()[name]}


@torch.no_grad()
def logits(folder: Path, base: Path | None = None) -> Tensor:
    """Logits for a fixed prompt with an image."""
    _, model, _, _ = load_pretrained_model(str(folder), None if base is None else str(base), device="cpu")
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1, 350, -200, 400, 500, 13]])
    return model(input_ids=ids, images=torch.randn(1, 3, 28, 28, generator=generator)).logits


def weights(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in weight_files(inspect_checkpoint(folder).weights):
        tensors |= read_tensors(path)
    return tensors


@pytest.fixture
def near_tower(tmp_path: Path) -> Path:
    """A folder to write into that has the tower beside it, under the name in the configurations."""
    shutil.copytree(LLAVA / "tiny-clip", tmp_path / "tiny-clip")
    return tmp_path


def test_merged_lora_is_the_same_model(near_tower: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = near_tower / "merged"
    arguments = ["--model-path", str(LORA), "--model-base", str(BASE), "--save-model-path", str(output)]
    merge_lora_weights.main(arguments)
    assert f"written: {output}" in capsys.readouterr().out
    assert not inspect_checkpoint(output).needs_base
    torch.testing.assert_close(logits(output), logits(LORA, BASE), rtol=0, atol=1e-6)
    changed = {
        name for name, value in weights(output).items() if not torch.equal(value, weights(BASE).get(name, value))
    }
    assert any("q_proj" in name for name in changed)
    with pytest.raises(CheckpointError, match="already exists"):
        merge_lora_weights.main(arguments)


def test_routed_blocks_cannot_be_merged(tmp_path: Path) -> None:
    arguments = ["--model-path", str(ROUTED), "--model-base", str(FULL), "--save-model-path", str(tmp_path / "out")]
    with pytest.raises(FlagError, match="hydralora"):
        merge_lora_weights.main(arguments)
    assert not list(tmp_path.iterdir())


def test_consolidate(near_tower: Path) -> None:
    output = near_tower / "one"
    consolidate.main(["--src", str(FULL), "--dst", str(output)])
    tower = "model.vision_tower."
    expected = {name: value for name, value in weights(FULL).items() if not name.startswith(tower)}
    ours = weights(output)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert torch.equal(logits(output), logits(FULL))


def test_consolidate_mends_the_generation_config(near_tower: Path) -> None:
    shutil.copytree(FULL, near_tower / "source")
    (near_tower / "source" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    consolidate.main(["--src", str(near_tower / "source"), "--dst", str(near_tower / "one")])
    assert "top_p" not in json.loads((near_tower / "one" / "generation_config.json").read_text())


def test_consolidate_refuses_lora(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no full weights"):
        consolidate.main(["--src", str(LORA), "--dst", str(tmp_path / "out")])


@pytest.mark.parametrize("source", [FULL, LORA, LLAVA / "tiny-llava-pretrain"], ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors"])
def test_extracted_projector(source: Path, name: str, tmp_path: Path) -> None:
    extract_mm_projector.main(["--model-path", str(source), "--output", str(tmp_path / name)])
    ours = read_projector(tmp_path / name)
    assert sorted(ours) == [f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
    expected = extract_mm_projector.projector_of(source)
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    with pytest.raises(CheckpointError, match="already exists"):
        extract_mm_projector.main(["--model-path", str(source), "--output", str(tmp_path / name)])


def test_extracting_from_a_plain_language_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no projector"):
        extract_mm_projector.main(["--model-path", str(BASE), "--output", str(tmp_path / "out.bin")])
    with pytest.raises(FlagError, match="must end in"):
        extract_mm_projector.main(["--model-path", str(FULL), "--output", str(tmp_path / "out.txt")])
    assert not list(tmp_path.iterdir())


def difference(base: Path, target: Path, delta: Path) -> None:
    paths = ["--base-model-path", str(base), "--target-model-path", str(target), "--delta-path", str(delta)]
    make_delta.main(paths)


def test_delta_there_and_back(near_tower: Path) -> None:
    delta, output = near_tower / "delta", near_tower / "again"
    difference(BASE, FULL, delta)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(weights(delta)[name], weights(FULL)[name] - weights(BASE)[name], rtol=0, atol=0)
    assert torch.equal(weights(delta)["model.mm_projector.0.weight"], weights(FULL)["model.mm_projector.0.weight"])
    paths = ["--base-model-path", str(BASE), "--target-model-path", str(output), "--delta-path", str(delta)]
    apply_delta.main(paths)
    for key, value in weights(FULL).items():
        torch.testing.assert_close(weights(output)[key], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(output), logits(FULL), rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="already exists"):
        apply_delta.main(paths)


def test_delta_of_a_model_with_more_tokens(tmp_path: Path) -> None:
    """Rows that the base has not are passed on as they are."""
    grown, size = tmp_path / "grown", 4
    shutil.copytree(FULL, grown, ignore=shutil.ignore_patterns("*.bin", "*.safetensors", "*.index.json"))
    tensors = weights(FULL)
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[table] = torch.cat([tensors[table], torch.full((size, tensors[table].shape[1]), 7.0)])
    torch.save(tensors, grown / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"config\.json asks for \(896, 40\)"):
        difference(BASE, grown, tmp_path / "delta")
    config = json.loads((grown / "config.json").read_text()) | {"vocab_size": 900}
    (grown / "config.json").write_text(json.dumps(config))
    difference(BASE, grown, tmp_path / "delta")
    assert weights(tmp_path / "delta")["lm_head.weight"][-size:].eq(7).all()


FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


def with_frequencies(folder: Path, output: Path, theta: float | None) -> Path:
    """A folder as programs of 2023 wrote it, with the frequencies of rotary embeddings; None: those of a difference."""
    shutil.copytree(folder, output)
    config = json.loads((folder / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    steps = torch.arange(0, width, 2) / width
    found = torch.zeros_like(steps) if theta is None else theta**-steps
    for path in (output / name for name in ("model.safetensors", "pytorch_model.bin")):
        path.unlink(missing_ok=True)
    tensors = {name: tensor.clone() for name, tensor in weights(folder).items()}
    save_file(tensors | {FREQUENCIES: found}, output / "model.safetensors", {"format": "pt"})
    return output


@pytest.mark.parametrize(("theta", "fits"), [(1e4, True), (1e6, False), (None, False)])
@pytest.mark.parametrize("side", ["base", "target"])
def test_stored_frequencies_are_compared(side: str, theta: float | None, fits: bool, near_tower: Path) -> None:
    sources = {"base": BASE, "target": FULL}
    sources[side] = with_frequencies(sources[side], near_tower / "old", theta)
    if fits:
        difference(sources["base"], sources["target"], near_tower / "delta")
        assert FREQUENCIES not in weights(near_tower / "delta")
        return
    with pytest.raises(CheckpointError, match=r"old.*inv_freq' says"):
        difference(sources["base"], sources["target"], near_tower / "delta")
    assert not (near_tower / "delta").exists()


@pytest.mark.parametrize(("theta", "fits"), [(1e4, True), (None, True), (1e6, False)])
def test_frequencies_of_a_difference_may_be_zero(theta: float | None, fits: bool, near_tower: Path) -> None:
    """The programs of 2023 subtracted all that was stored, the frequencies too."""
    difference(BASE, FULL, near_tower / "delta")
    delta, output = with_frequencies(near_tower / "delta", near_tower / "old", theta), near_tower / "again"
    paths = ["--base-model-path", str(BASE), "--target-model-path", str(output), "--delta-path", str(delta)]
    if fits:
        apply_delta.main(paths)
        torch.testing.assert_close(logits(output), logits(FULL), rtol=0, atol=1e-5)
        return
    with pytest.raises(CheckpointError, match=r"old.*inv_freq' says"):
        apply_delta.main(paths)
    assert not output.exists()


def test_delta_of_models_that_do_not_belong_together(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    tensors = weights(BASE)
    tensors.pop("model.norm.weight")
    torch.save(tensors, other / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"do not belong together.*model\.norm\.weight"):
        difference(other, FULL, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_nothing_is_uploaded(tmp_path: Path) -> None:
    arguments = ["--base-model-path", "a", "--target-model-path", "b", "--delta-path", "c", "--hub-repo-id", "me/x"]
    with pytest.raises(FlagError, match="hf upload"):
        make_delta.main(arguments)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_start(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    assert module.__doc__.splitlines()[0] in module.build_parser().format_help().replace("\n", " ")


@pytest.mark.parametrize("recorded", [True, False], ids=["named in config.json", "seen in the files"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_merging_writes_the_dtype_of_a_base_on_the_hub(
    dtype: torch.dtype, recorded: bool, near_tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is laid out as the hub's own library does; nothing is fetched."""
    cache, commit = near_tower / "cache", "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    folder = cache / "models--owner--tiny-vicuna"
    base = folder / "snapshots" / commit
    shutil.copytree(BASE, base, ignore=shutil.ignore_patterns("*.bin", "*.safetensors", "*.index.json"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    torch.save({name: value.to(dtype) for name, value in weights(BASE).items()}, base / "pytorch_model.bin")
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype", None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.") if recorded else None
    (base / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    for name, path in (("hub", "owner/tiny-vicuna"), ("folder", str(base))):
        output = near_tower / name
        merge_lora_weights.main(["--model-path", str(LORA), "--model-base", path, "--save-model-path", str(output)])
        assert {value.dtype for value in weights(output).values()} == {dtype}
