"""In which dtype, and in whose memory, a run has the weights of its base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llava.model.components import Component, components
from llava.model.formats import read_tensors
from llava.runtime.tokenizer import load_tokenizer
from llava.train import build
from llava.train.train import parse_args
from tests.llava.train.launching import ROOT
from tests.llava.train.test_training import BASE, command_line

pytest.importorskip("deepspeed", reason="the extra 'train' is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA in bfloat16, in one file of safetensors, as published ones are stored."""
    folder = tmp_path_factory.mktemp("bases") / "half"
    shutil.copytree(BASE, folder)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("pytorch_model-*.bin")):
        tensors |= read_tensors(path)
        path.unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    halves = {name: value.bfloat16().contiguous() for name, value in tensors.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    return folder


def built(base: Path, tmp_path: Path, **options: Any) -> nn.Module:
    args = parse_args(command_line(tmp_path / "out", model_name_or_path=base, **options))
    tokenizer = load_tokenizer(str(base), model_max_length=args.training.model_max_length)
    return build.build_model(args, tokenizer)


def mapped_from(path: Path) -> list[range]:
    """Addresses of this process at which a file is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if len(line) == 6 and line[5] == str(path.resolve())]
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def share_in_the_file(model: nn.Module, path: Path) -> float:
    """Share of the language model's bytes that are pages of the file."""
    spans = mapped_from(path)
    weights = components(model)[Component.LANGUAGE_MODEL].values()
    inside = [weight.nbytes for weight in weights if any(weight.data_ptr() in span for span in spans)]
    return sum(inside) / sum(weight.nbytes for weight in weights)


HALF: dict[str, Any] = {"bf16": True, "deepspeed": ROOT / "scripts" / "zero2.json"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="says nothing of mapped files")
def test_full_fine_tuning_under_deepspeed_reads_the_base_as_it_is_stored(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it takes memory of the process, and its numbers are those of a base that is read in float32."""
    model = built(base, tmp_path, **HALF)
    weights = dict(model.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.requires_grad for weight in components(model)[Component.LANGUAGE_MODEL].values())
    assert share_in_the_file(model, base / "model.safetensors") == 1

    monkeypatch.setattr(build, "weight_dtype", lambda args: torch.float32)
    read_wide = built(base, tmp_path, **HALF)
    assert share_in_the_file(read_wide, base / "model.safetensors") == 0
    for name, weight in read_wide.named_parameters():
        assert torch.equal(weight, weights[name]), name


def test_trained_weights_are_wide_without_deepspeed_and_under_a_deepspeed_without_half_precision(
    base: Path, tmp_path: Path
) -> None:
    plain = built(base, tmp_path, bf16=True)
    wide = built(base, tmp_path, deepspeed=HALF["deepspeed"])
    for model in (plain, wide):
        assert {weight.dtype for weight in components(model)[Component.LANGUAGE_MODEL].values()} == {torch.float32}
