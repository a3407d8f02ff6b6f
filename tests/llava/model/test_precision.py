"""Dtype and device of what is loaded: the same on every device, with every extension."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hydralora.block import RoutedMLP
from hydralora.config import HydraLoraSettings, RoutedLinearConfig, RoutedMLPConfig
from hydralora.extension import HydraLoraExtension
from hydralora.layer import RoutedUpdate
from llava.model import builder
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import save_checkpoint
from tests.dynamic.sparse_models import sparse_llava
from tests.golden import golden_dir
from tests.mma.adapted_models import adapted_llava

BASE = golden_dir("llava") / "tiny-llava-v1.5"
IDS = torch.tensor([[1, 350, -200, 400, 500, 13]])


def routed_llava() -> Any:
    """Routed MLP blocks, and HydraLoRA on the attention of decoder and tower."""
    model = load_pretrained_model(str(BASE), device="cpu")[1]
    linear = RoutedLinearConfig(["attention", "vision"], rank=4)
    settings = HydraLoraSettings(RoutedMLPConfig(experts=3, rank=4), linear)
    model.extensions.attach(model, HydraLoraExtension(), settings.to_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        for module in model.modules():
            if isinstance(module, RoutedMLP | RoutedUpdate):
                module.reset_parameters(identity=False)
    return model.eval().requires_grad_(False)


EXTENDED = {"hydralora": routed_llava, "dynamic": sparse_llava, "mma": adapted_llava}


@pytest.fixture(scope="module", params=EXTENDED)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with an extension in float32, and its checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    model = EXTENDED[request.param]()
    save_checkpoint(model, folder, load_pretrained_model(str(BASE), device="cpu")[0])
    return model, folder


def logits_of(model: Any) -> Tensor:
    """Logits (L, V) of a prompt with an image."""
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=IDS, images=image.to(model.dtype)).logits[0].float()


def dtypes(model: Any) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Those of what extensions added, and those of everything else."""
    added = {id(weight) for weight in model.extensions.named_parameters(model).values()}
    own, rest = set(), set()
    for weight in model.parameters():
        (own if id(weight) in added else rest).add(weight.dtype)
    return own, rest


def to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let whatever is meant for a GPU be read to the CPU; the list gets the device maps that transformers was told."""
    told: list[Any] = []
    load_base = builder._load_base

    def on_cpu(contents: Any, base: Any, options: dict[str, Any], *more: Any) -> Any:
        told.append(options.get("device_map"))
        return load_base(contents, base, options | ({"device_map": {"": "cpu"}} if told[-1] else {}), *more)

    monkeypatch.setattr(builder, "_load_base", on_cpu)
    return told


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.bfloat16), ("cpu", torch.float16), ("cuda", torch.float16), ("cuda:1", torch.float16)],
    ids=str,
)
def test_extensions_stay_in_fp32(
    saved: tuple[Any, Path], device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is rounded, what was trained on top of it is not: whatever the extension, wherever it is loaded."""
    exact, folder = saved
    to_the_cpu(monkeypatch)
    model = load_pretrained_model(str(folder), str(BASE), device=device, torch_dtype=dtype)[1]
    assert dtypes(model) == ({torch.float32}, {dtype})
    for name, weight in model.extensions.named_parameters(model).items():
        assert torch.equal(weight, exact.extensions.named_parameters(exact)[name]), name
    assert model.generate(IDS, images=torch.zeros(1, 3, 28, 28, dtype=dtype), max_new_tokens=2).shape == (1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotary_frequencies_are_not_rounded(dtype: torch.dtype) -> None:
    """They stay as transformers has them, in float32: rounded ones turn far positions by a wrong angle."""
    exact, half = (load_pretrained_model(str(BASE), device="cpu", torch_dtype=kind)[1] for kind in (None, dtype))
    assert torch.equal(half.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)
    assert dtypes(half) == (set(), {dtype})


@pytest.mark.parametrize("bits", [None, "load_4bit", "load_8bit"])
@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda", "auto"), ("cuda:0", {"": "cuda:0"}), ("cuda:1", {"": "cuda:1"}), ("cpu", {"": "cpu"})],
)
def test_weights_go_where_they_were_asked_for(
    device: str, expected: Any, bits: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers is told."""
    if bits:
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    told = to_the_cpu(monkeypatch)
    options = {bits: True} if bits else {}
    model = load_pretrained_model(str(BASE), device=device, torch_dtype=torch.float32, **options)[1]
    assert told == [None if device == "cpu" and not bits else expected]
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}, "nothing but the map moves it"
