"""HydraLoRA on attention projections: the update itself, and how it enters decoders and towers of every kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hydralora import HydraLoraConfig, HydraLoraLayer
from hydralora.config import HydraLoraSettings, RoutedLinearConfig, RoutedMLPConfig
from hydralora.extension import HydraLoraExtension
from hydralora.layer import RoutedUpdate, side_by_side
from hydralora.linears import add_updates, added_parameters, projections, routed_updates
from llava.errors import CheckpointError
from llava.model.multimodal_encoder.builder import build_vision_tower
from tests.golden import golden_dir
from tests.llava.model import towers
from tests.model.backbones import MODELS, plain_model

NAMES = {"lora_A": "shared_A", "lora_B": "experts_B", "lora_router": "router"}
X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[5, 9, 31, 7, 60, 2]])
PIXELS = torch.randn(2, 3, towers.IMAGE, towers.IMAGE, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """The smallest module of the shape of an attention of transformers; it only projects."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) * self.k_proj(x) + self.v_proj(x))


def host(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Attention())


def config(*targets: str, **changes: Any) -> RoutedLinearConfig:
    return RoutedLinearConfig(list(targets), **{"rank": 3, "alpha": 6.0, "dropout": 0.0} | changes)


def let_experts_act(model: nn.Module, seed: int = 2) -> None:
    torch.manual_seed(seed)
    for update in routed_updates(model).values():
        update.reset_parameters(identity=False)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    (model(X) ** 2).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def trained_weights(layer: HydraLoraLayer, update: RoutedUpdate) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """The weights of an adapter of PEFT, which for one expert has no router, with those of an update."""
    for theirs, ours in NAMES.items():
        if "default" in (parts := getattr(layer, theirs)):
            yield parts["default"].weight, getattr(update, ours)


@pytest.mark.parametrize("experts", [1, 3])
def test_it_is_the_layer_of_the_peft_method(experts: int) -> None:
    """The same outputs and gradients as an adapter of the type HYDRALORA with the same weights.

    Not bit for bit with several experts: there the product adds to the frozen layer's output, here it is added to it.
    """
    ours = host()
    peft_config = HydraLoraConfig(r=3, lora_alpha=6, lora_nums=experts, target_modules=["q_proj", "o_proj"])
    theirs = get_peft_model(host(), peft_config)
    add_updates({"attention": list(ours)}, config("attention.q_proj", "attention.o_proj", experts=experts))
    let_experts_act(ours)
    updates = [u for u in ours.modules() if isinstance(u, RoutedUpdate)]
    layers = [layer for layer in theirs.modules() if isinstance(layer, HydraLoraLayer)]
    for update, layer in zip(updates, layers, strict=True):
        for its, weight in trained_weights(layer, update):
            its.data.copy_(side_by_side(weight) if weight.dim() == 3 else weight)
    close = {"rtol": 0, "atol": 0 if experts == 1 else 1e-5}
    torch.testing.assert_close(ours(X), theirs(X), **close)
    assert not torch.allclose(ours(X), host()(X), atol=1e-3)
    gradients(ours), gradients(theirs)
    for update, layer in zip(updates, layers, strict=True):
        for its, weight in trained_weights(layer, update):
            expected = side_by_side(weight.grad) if weight.dim() == 3 else weight.grad
            scale = {} if experts == 1 else {"atol": 1e-5 * float(expected.abs().max())}
            torch.testing.assert_close(its.grad, expected, **close | scale)


@pytest.mark.parametrize("experts", [1, 2])
def test_one_expert_is_lora(experts: int) -> None:
    """With E = 1 it is PEFT's LoRA, number for number; with E = 2 it is not."""
    ours, lora = host(), get_peft_model(host(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]))
    add_updates({"attention": list(ours)}, config("attention.q_proj", experts=experts))
    let_experts_act(ours)
    update, layer = ours[0].q_proj.routed, lora.get_base_model()[0].q_proj
    layer.lora_A["default"].weight.data.copy_(update.shared_A)
    layer.lora_B["default"].weight.data.copy_(update.experts_B[0])
    assert torch.equal(ours(X), lora(X)) == (experts == 1)
    gradients(ours), gradients(lora)
    same = torch.equal(update.experts_B.grad[0], layer.lora_B["default"].weight.grad)
    assert same == torch.equal(update.shared_A.grad, layer.lora_A["default"].weight.grad) == (experts == 1)


def test_dropout_acts_in_training_alone() -> None:
    model = host()
    add_updates({"attention": list(model)}, config("attention", dropout=0.5))
    let_experts_act(model)
    assert not torch.equal(model.train()(X), model(X))
    assert torch.equal(model.eval()(X), model(X))


def test_a_copy_stands_on_its_own() -> None:
    model = host()
    add_updates({"attention": list(model)}, config("attention"))
    let_experts_act(model)
    copied, before = copy.deepcopy(model), model(X)
    let_experts_act(copied, seed=9)
    assert torch.equal(model(X), before)
    assert not torch.allclose(copied(X), before, atol=1e-3)


def battery(model: nn.Module, layers: dict[str, Any], targets: list[str], run: Any) -> set[str]:
    """Identity at the start, act afterwards; base keys and frozen weights as they were. Names of what was added."""
    keys, before = list(model.state_dict()), run()
    add_updates(layers, config(*targets))
    added = dict(added_parameters(model))
    assert [key for key in model.state_dict() if key not in added] == keys
    assert all(weight.requires_grad for weight in added.values())
    assert torch.equal(run(), before)
    let_experts_act(model)
    assert not torch.allclose(run(), before, atol=1e-3)
    return set(added)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if "," not in kind])
def test_every_backbone(kind: str) -> None:
    model = plain_model(kind)
    layers = {"attention": model.get_decoder().layers}

    def run() -> Tensor:
        with torch.no_grad():
            return model(input_ids=IDS).logits

    added = battery(model, layers, ["attention.q_proj", "attention.o_proj"], run)
    places = [f"model.layers.{i}.self_attn.{name}.routed" for i in range(3) for name in ("q_proj", "o_proj")]
    assert added == {f"{place}.{name}" for place in places for name in NAMES.values()}
    with pytest.raises(ValueError, match="already"):
        add_updates(layers, config("attention"))


def tower(folder: Path) -> Any:
    name = SimpleNamespace(mm_vision_tower=str(folder), mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    built = build_vision_tower(name)
    built.load_model()
    return built


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_of_transformers(kind: str, tmp_path: Path) -> None:
    model = tower(golden_dir("llava") / "tiny-clip" if kind == "clip" else towers.siglip(tmp_path))
    blocks = model.blocks(model.loaded())[: model.num_blocks]
    added = battery(model, {"vision": blocks}, ["vision"], lambda: model(PIXELS))
    assert len(added) == model.num_blocks * 4 * 3
    assert model.num_blocks < len(model.blocks(model.loaded())), "blocks that never run must stay as they are"


def test_a_tower_of_open_clip_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="the extra 'openclip' is not installed")
    model = tower(towers.open_clip(tmp_path))
    with pytest.raises(ValueError, match=r"'vision': layer 0 .*transformers' format"):
        add_updates({"vision": model.blocks(model.loaded())}, config("vision"))


@pytest.mark.parametrize(
    ("layers", "target", "message"),
    [
        ({"attention": []}, "attention", "has no layers"),
        ({"attention": [nn.Linear(2, 2)]}, "attention", "holds 0 attention modules"),
        ({"attention": [nn.Sequential(Attention(), Attention())]}, "attention", "holds 2 attention modules"),
        ({"attention": [Attention()]}, "attention.out_proj", r"has no \['out_proj'\]; it has"),
    ],
    ids=str,
)
def test_layers_that_do_not_fit(layers: dict[str, Any], target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_updates(layers, config(target))


def test_nothing_is_changed_by_a_refusal() -> None:
    good, bad = Attention(), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="layer 1"):
        add_updates({"attention": [good, bad]}, config("attention"))
    assert not routed_updates(good)
    assert good.q_proj.weight.requires_grad


def test_what_is_an_attention() -> None:
    assert list(projections(Attention())) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    both = Attention()
    both.out_proj = nn.Linear(12, 12)
    for module in (both, nn.MultiheadAttention(8, 2), nn.Linear(3, 3)):
        assert not projections(module)


class TestSettings:
    def test_blocks_alone_are_stored_as_ever(self) -> None:
        flat = RoutedMLPConfig(rank=4).to_dict()
        assert HydraLoraSettings(RoutedMLPConfig(rank=4)).to_dict() == flat
        assert HydraLoraSettings.from_dict(flat) == HydraLoraSettings(RoutedMLPConfig(rank=4))

    @pytest.mark.parametrize("mlp", [None, RoutedMLPConfig(rank=4)])
    def test_round_trip(self, mlp: RoutedMLPConfig | None) -> None:
        settings = HydraLoraSettings(mlp, config("attention.q_proj", "vision"))
        assert HydraLoraSettings.from_dict(settings.to_dict()) == settings

    def test_projections(self) -> None:
        both = config("attention.q_proj", "vision", "attention.v_proj", "vision.k_proj")
        assert both.projections("attention") == ["q_proj", "v_proj"]
        assert both.projections("vision") == []
        assert config("vision").projections("attention") is None

    @pytest.mark.parametrize("targets", [[], ["mlp"], ["attention.q_proj.x"], ["vision."], "attention"], ids=str)
    def test_wrong_targets(self, targets: Any) -> None:
        with pytest.raises(ValueError, match="targets"):
            RoutedLinearConfig(targets)

    def test_a_model_without_tower(self) -> None:
        model = plain_model("llama")
        model.get_vision_tower = lambda: None
        settings = HydraLoraSettings(None, config("vision"))
        with pytest.raises(CheckpointError, match="the vision tower has no layers"):
            HydraLoraExtension().attach(model, settings.to_dict())
