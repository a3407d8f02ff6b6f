"""Merged and unmerged: the same logits for the modality that was merged for, and nothing left that costs time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava.constants import IMAGE_TOKEN_INDEX
from llava.convert.hf import to_hf
from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import save_checkpoint
from llava.model.language_model.backbones import backbone_class, load_config
from mma.config import MmaConfig
from mma.lavin.merge import main
from mma.lavin.merging import declare_biases, merge
from mma.layer import RepAdapter
from tests.llava.model.test_generation import prompts
from tests.mma.adapted_models import BASE, CLOSE, adapted_llava, attach_adapters
from tests.model import backbones

CONFIGS = {
    "attn, no vision": MmaConfig(visual_adapter_type="none"),
    "block, plain vision": MmaConfig(adapter_type="block", visual_adapter_type="normal", adapter_scale=0.7),
    "block, routed vision": MmaConfig(adapter_type="block", visual_adapter_type="router_block", temperature=2.0),
}
PROMPT_OF = {"image": 0, "text": 2}


def logits_of(model: Any, modality: str) -> Tensor:
    batch = prompts()
    row, images = batch.rows[PROMPT_OF[modality]][None], batch.images_of_rows[PROMPT_OF[modality]]
    with torch.no_grad():
        return model(input_ids=row, images=images).logits


@pytest.mark.parametrize("modality", PROMPT_OF)
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_is_the_same(name: str, modality: str) -> None:
    model = adapted_llava(CONFIGS[name])
    expected, other = logits_of(model, modality), logits_of(model, "text" if modality == "image" else "image")
    merge(model, modality)
    torch.testing.assert_close(logits_of(model, modality), expected, **CLOSE)
    left = [module for module in model.get_decoder().layers.modules() if isinstance(module, RepAdapter)]
    hooks = [module for module in model.get_decoder().layers.modules() if module._forward_hooks]
    assert not left
    assert not hooks
    tower = [module for module in model.get_vision_tower().modules() if isinstance(module, RepAdapter)]
    assert bool(tower) == (name == "block, routed vision")
    with pytest.raises(ValueError, match=f"were merged for samples of {modality} alone, and rows .0. are of the other"):
        logits_of(model, "text" if modality == "image" else "image")
    model.extensions.reconfigure("mma", None)
    wrong = logits_of(model, "text" if modality == "image" else "image")
    assert (wrong - other).abs().max() > 0.05, "the adapters of the other modality are other ones"


@pytest.mark.parametrize("plain", [False, True], ids=["checked", "plain"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_checkpoint(name: str, plain: bool, tmp_path: Path) -> None:
    """Full weights that load without the base and give the same logits and tokens."""
    model = adapted_llava(CONFIGS[name])
    tokenizer = load_pretrained_model(str(BASE), device="cpu")[0]
    save_checkpoint(model, tmp_path / "adapters", tokenizer)
    words = [str(tmp_path / "adapters"), str(tmp_path / "merged"), "--model-base", str(BASE), "--dtype", "float32"]
    words += ["--plain"] if plain else []
    if plain and name == "block, routed vision":
        with pytest.raises(CheckpointError, match="leave --plain out"):
            main(words)
        assert not (tmp_path / "merged").exists()
        return
    main(words)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "merged" / "extensions").exists() != plain
    merged = load_pretrained_model(str(tmp_path / "merged"), device="cpu")[1]
    assert merged.config.attention_bias
    assert set(merged.extensions.configs) == (set() if plain else {"mma"})
    torch.testing.assert_close(logits_of(merged, "image"), logits_of(model, "image"), **CLOSE)
    batch = prompts()
    fixed = {"do_sample": False, "max_new_tokens": 5}
    tokens = [each.generate(batch.rows[0][None], images=batch.images_of_rows[0], **fixed) for each in (model, merged)]
    assert torch.equal(*tokens)


def test_in_half_precision_it_is_rounded_once(tmp_path: Path) -> None:
    model = adapted_llava(CONFIGS["attn, no vision"])
    save_checkpoint(model, tmp_path / "adapters", load_pretrained_model(str(BASE), device="cpu")[0])
    main([str(tmp_path / "adapters"), str(tmp_path / "merged"), "--model-base", str(BASE)])
    merged = load_pretrained_model(str(tmp_path / "merged"), device="cpu")[1]
    expected = logits_of(model, "image")
    distance = float((logits_of(merged, "image") - expected).norm() / expected.norm())
    assert 0 < distance < 5e-3  # measured: 1.6e-3


def test_transformers_own_llava_reads_what_was_merged_for_images(tmp_path: Path) -> None:
    """On LLaVA's own patches nothing of the method is left: biases in the attention, in their usual places."""
    model = adapted_llava(CONFIGS["block, plain vision"])
    save_checkpoint(model, tmp_path / "adapters", load_pretrained_model(str(BASE), device="cpu")[0])
    words = ["--model-base", str(BASE), "--dtype", "float32", "--plain"]
    main([str(tmp_path / "adapters"), str(tmp_path / "merged"), *words])
    to_hf(tmp_path / "merged", tmp_path / "hf")
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    count = model.get_vision_tower().num_features
    ids, image = [1, 350, IMAGE_TOKEN_INDEX, 400, 500, 13], torch.randn(1, 3, 28, 28)
    expanded = [place for index in ids for place in ([hf.config.image_token_index] * count if index < 0 else [index])]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), images=image).logits
        result = hf(input_ids=torch.tensor([expanded]), pixel_values=image).logits
    torch.testing.assert_close(result[..., : expected.shape[-1]], expected, **CLOSE)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_backbones(kind: str, tmp_path: Path) -> None:
    """All merge in memory; what a config.json cannot say is not written."""
    folder = backbones.save_base(kind, tmp_path)
    ours = backbone_class(folder).from_pretrained(folder, config=load_config(folder))
    attach_adapters(ours, MmaConfig(adapter_type="attn", visual_adapter_type="none"))
    ids = torch.randint(3, 890, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        merge(ours, "text")
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, **CLOSE)
        if kind == "mistral":
            with pytest.raises(CheckpointError, match=r"biases \(k_proj, q_proj, v_proj\) that no setting"):
                declare_biases(ours)
            return
        declare_biases(ours)
        ours.save_pretrained(tmp_path / "merged")
        again = backbone_class(folder).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_biases_that_no_setting_reads_back(kind: str, tmp_path: Path) -> None:
    """Their MLPs have no setting for them, so adapters in front of these merge in memory alone."""
    folder = backbones.save_base(kind, tmp_path)
    ours = backbone_class(folder).from_pretrained(folder, config=load_config(folder))
    attach_adapters(ours, MmaConfig(adapter_type="block", visual_adapter_type="none"))
    merge(ours, "text")
    with pytest.raises(CheckpointError, match=r"biases \(gate_proj, up_proj\) that no setting"):
        declare_biases(ours)


def test_what_cannot_be_merged() -> None:
    with pytest.raises(CheckpointError, match="has no adapters"):
        merge(load_pretrained_model(str(BASE), device="cpu")[1], "image")
    model = adapted_llava(CONFIGS["attn, no vision"])
    before = logits_of(model, "image")
    model.get_decoder().layers[2].self_attn.v_proj.add_module("update", torch.nn.Identity())
    with pytest.raises(CheckpointError, match="decoder layer 2: 'v_proj' is a Linear with an update of its own"):
        merge(model, "image")
    torch.testing.assert_close(logits_of(model, "image"), before, rtol=0, atol=1e-5)


def test_what_cannot_be_merged_is_left_whole() -> None:
    """A layer of the tower, which comes last, refuses: the decoder has not been touched then."""
    model = adapted_llava(CONFIGS["block, plain vision"])
    before = {kind: logits_of(model, kind) for kind in PROMPT_OF}
    tower = model.get_vision_tower()
    tower.blocks(tower.loaded())[tower.num_blocks - 1].self_attn.q_proj.add_module("update", torch.nn.Identity())
    with pytest.raises(CheckpointError, match="block 1 of the tower: 'q_proj' is a Linear with an update of its own"):
        merge(model, "image")
    for kind, logits in before.items():
        assert torch.equal(logits_of(model, kind), logits)


def test_a_model_in_training_mode() -> None:
    """What is folded was not drawn by dropout or drop_path, and the model stays in the mode that it was in."""
    config = MmaConfig(adapter_type="block", visual_adapter_type="normal", adapter_dropout=0.5, drop_path=0.5)
    model = adapted_llava(config)
    expected = logits_of(model, "image")
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    merge(model, "image")
    assert all(module.training == modes[name] for name, module in model.named_modules())
    torch.testing.assert_close(logits_of(model.eval(), "image"), expected, rtol=1e-4, atol=2e-5)
