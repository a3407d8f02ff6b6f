"""How adapters enter their hosts: every kind of tower, copies, stochastic depth, what is refused, the configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils

from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_vision_tower
from mma.config import MmaConfig
from mma.decoder_layer import drop_path
from mma.extension import MmaExtension
from mma.layer import RepAdapter
from mma.model import adapters, attach, norms
from tests.dynamic.test_inference import plain_flash_attention
from tests.golden import golden_dir
from tests.llava.model import towers
from tests.mma.adapted_models import BASE, BLOCK, CLOSE, adapted_llava, shake
from tests.mma.test_inference import logits_of

PIXELS = torch.randn(2, 3, towers.IMAGE, towers.IMAGE, generator=torch.Generator().manual_seed(0))


class Host(nn.Module):
    """A text model without layers, so that nothing but a tower is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList()

    def get_decoder(self) -> nn.Module:
        return self.decoder


@pytest.mark.parametrize("visual_type", ["normal", "router", "router_block"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
def test_every_kind_of_tower(kind: str, visual_type: str, tmp_path: Path) -> None:
    """Fresh routed adapters change nothing, fresh plain ones feed attention with zeros; images are independent."""
    folder = {"clip": lambda: golden_dir("llava") / "tiny-clip", "siglip": lambda: towers.siglip(tmp_path),
              "open_clip": lambda: towers.open_clip(tmp_path)}[kind]()  # fmt: skip
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower=str(folder), mm_vision_select_layer=-2))
    tower.load_model()
    plain = tower(PIXELS)
    keys = set(tower.state_dict())
    blocks = tower.blocks(tower.loaded())[: tower.num_blocks]
    config = MmaConfig(adapter_type="none", visual_adapter_type=visual_type)
    attach(Host(), config, blocks=blocks)
    assert keys < set(tower.state_dict()), "the tower's own weights keep their names"
    assert [len(adapters(block)) for block in blocks] == [config.adapters_per_block] * tower.num_blocks
    fresh = tower(PIXELS)
    assert torch.equal(fresh, plain) == (visual_type != "normal")
    shaken = shake(SimpleModel(tower))
    features = shaken(PIXELS)
    assert (features - fresh).abs().max() > 0.1
    for number in range(len(PIXELS)):
        torch.testing.assert_close(shaken(PIXELS[number : number + 1])[0], features[number], **CLOSE)


class SimpleModel(nn.Module):
    """A tower where `shake` expects a model."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower.eval()

    def get_decoder(self) -> nn.Module:
        return nn.Module()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.tower(images)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = adapted_llava()
    expected = logits_of(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(other), expected)
    with torch.no_grad():
        for weight in other.extensions.named_parameters(other).values():
            weight.add_(0.3)
    assert (logits_of(other) - expected).abs().max() > 0.1
    assert torch.equal(logits_of(model), expected)


def test_stochastic_depth() -> None:
    """In training a branch is dropped for whole samples and enlarged for others, so that the mean stays."""
    x = torch.ones(4000, 3, 2)
    output = drop_path(x, 0.25, training=True)
    per_sample = output.flatten(1)
    assert bool((per_sample == per_sample[:, :1]).all())
    assert {round(value, 4) for value in per_sample[:, 0].unique().tolist()} == {0.0, 1.3333}
    assert output.mean().item() == pytest.approx(1, abs=0.04)
    assert drop_path(x, 0.25, training=False) is x
    assert drop_path(x, 0.0, training=True) is x
    model = adapted_llava(MmaConfig(drop_path=0.5, adapter_dropout=0.0))
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(adapted_llava(MmaConfig())), expected, rtol=0, atol=1e-6)
    assert not torch.equal(logits_of(model.train()), expected)


def test_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention's kernels are replaced by plain torch; it gets no mask that it could not express."""
    model = adapted_llava()
    expected = logits_of(model)
    plain = plain_flash_attention()
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *args, **kwargs: plain)
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    for item in model.extensions:
        item.extension._tables.clear()
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)
    with torch.enable_grad():
        ids = torch.tensor([[1, 350, 400, 500, 13]])
        assert model(input_ids=ids).logits.isfinite().all()


def test_what_is_refused() -> None:
    model: Any = adapted_llava()
    with pytest.raises(CheckpointError, match="extension 'mma': the model has adapters already"):
        MmaExtension().attach(model, BLOCK.to_dict())
    bare = load_pretrained_model(str(BASE), device="cpu")[1]
    bare.get_model().vision_tower = None
    with pytest.raises(CheckpointError, match="no block of a vision tower runs here"):
        MmaExtension().attach(bare, BLOCK.to_dict())
    assert not [module for module in bare.modules() if isinstance(module, RepAdapter)]
    with pytest.raises(CheckpointError, match=r"unknown \['rank'\]"):
        MmaExtension().attach(bare, {"rank": 4})
    with pytest.raises(ValueError, match="a Linear has no pair of norms"):
        norms(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_dim": 0}, "adapter_dim is 0"),
        ({"adapter_dim": True}, "adapter_dim is True, expected int"),
        ({"temperature": "hot"}, "temperature is 'hot', expected float"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"visual_adapter_type": "cls"}, "visual_adapter_type is 'cls'"),
        ({"merged_for": "image"}, "merged_for is 'image' beside adapter_type 'attn'"),
        ({"adapter_dim": 6, "adapter_groups": 4}, "adapter_dim 6 is not a multiple of adapter_groups 4"),
    ],
)
def test_configurations_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MmaConfig.from_dict(values)
    assert MmaConfig.from_dict(BLOCK.to_dict()) == BLOCK
