"""The vision side against the original's numbers: class tokens of every fourth block, adapters, routing, gradients.

The original routes all images of a batch by the first one; ours routes each by itself, as the original does for a
image alone (`feats_single`). Its gradients are those of a batch, and are compared with that coupling put in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from mma.config import MmaConfig
from mma.extension import MmaExtension
from mma.layer import RoutedRepAdapter
from mma.model import adapters
from mma.original import original_names
from tests.golden import load_case
from tests.mma.golden_model import llava_config, write_tower

VARIANTS = ["none", "normal", "router", "router_block"]
FORWARD = {"rtol": 1e-4, "atol": 1e-4}


def build(variant: str, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """A LLaVA whose tower has the adapters of a variant, and the tensors of the case."""
    case, tensors = load_case("lavin", "clip_base")
    tower = write_tower(folder / "tower", case["config"])
    model = LlavaLlamaForCausalLM(llava_config(case["config"], tower))
    model.get_model().load_vision_tower([tower])
    settings = {**case["config"]["adapter"], "adapter_type": "none", "visual_adapter_type": variant}
    model.extensions.attach(model, MmaExtension(), MmaConfig.from_dict(settings).to_dict())
    names = {ours: theirs for ours, theirs in original_names(model).items() if "resblocks" in theirs}
    weights = {ours: tensors[f"{variant}/w/{theirs}"] for ours, theirs in names.items()}
    assert len(weights) == sum(key.startswith(f"{variant}/w/") for key in tensors)
    model.load_state_dict(weights, strict=False)
    return model.eval().requires_grad_(False), tensors


@pytest.mark.parametrize("variant", VARIANTS)
def test_features(variant: str, tmp_path: Path) -> None:
    model, tensors = build(variant, tmp_path)
    tower, images = model.get_vision_tower(), tensors["in/images"]
    features = tower(images)
    assert tower.num_features == features.shape[1] == 2
    torch.testing.assert_close(features, tensors[f"{variant}/out/feats_single"], **FORWARD)
    torch.testing.assert_close(features[:1], tensors[f"{variant}/out/feats_batch"][:1], **FORWARD)
    order = tensors["in/permutation"]
    torch.testing.assert_close(tower(images[order]), features[order], **FORWARD)
    if variant.startswith("router"):
        difference = (features - tensors[f"{variant}/out/feats_batch"])[1:].abs().max()
        assert difference > 1, "the original's images depend on the first one of the batch"
    if variant != "none":
        assert not torch.allclose(features, tensors["none/out/feats_single"], atol=0.1)


@pytest.mark.parametrize("variant", ["router", "router_block"])
def test_every_token_is_routed_by_itself(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tensors = build(variant, tmp_path)
    noted: list[Tensor] = []
    route = RoutedRepAdapter.route

    def noting(self: RoutedRepAdapter, x: Tensor) -> Tensor:
        noted.append(route(self, x))
        return noted[-1]

    monkeypatch.setattr(RoutedRepAdapter, "route", noting)
    tower = model.get_vision_tower()
    tower(tensors["in/images"])
    per_block = len(adapters(tower.blocks(tower.loaded())[0]))
    weights = torch.stack(noted[::per_block], dim=1)  # (N, blocks, P + 1, 2)
    expected = tensors[f"{variant}/out/routing_attn_single"]
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
    if variant == "router_block":
        first = torch.stack([routing[0] for routing in noted[1::2]])
        torch.testing.assert_close(first, tensors["router_block/out/routing_mlp_batch"], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("coupled")
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_gradients(variant: str, tmp_path: Path) -> None:
    model, tensors = build(variant, tmp_path)
    names = {ours: theirs for ours, theirs in original_names(model).items() if "resblocks" in theirs}
    trained = {theirs: model.get_parameter(ours).requires_grad_() for ours, theirs in names.items()}
    tower = model.get_vision_tower()
    tower.trainable = True
    features = tower(tensors["in/images"])
    torch.testing.assert_close(features, tensors[f"{variant}/out/feats_batch"], **FORWARD)
    (features * tensors["in/cotangent"]).sum().backward()
    for theirs, weight in trained.items():
        expected = tensors[f"{variant}/grad/{theirs}"]
        error = float((weight.grad - expected).abs().max())
        assert error <= 1e-3 * float(expected.abs().max()), f"{theirs}: {error} of {float(expected.abs().max())}"


def test_the_last_class_token_needs_its_block(tmp_path: Path) -> None:
    """Blocks behind the last multiple of N do not run and have no adapter."""
    case, _ = load_case("lavin", "clip_base")
    tower = write_tower(tmp_path / "tower", case["config"])
    model = LlavaLlamaForCausalLM(llava_config(case["config"], tower, mm_vision_select_layer=-2))
    model.get_model().load_vision_tower([tower])
    model.extensions.attach(model, MmaExtension(), MmaConfig(visual_adapter_type="router").to_dict())
    ours = model.get_vision_tower()
    assert (ours.num_blocks, ours.num_features) == (4, 1)
    assert [len(adapters(block)) for block in ours.blocks(ours.loaded())] == [1] * 4 + [0] * 4
