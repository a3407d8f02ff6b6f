"""Kinds of frozen layers: each one adapted like the linear layer that computes the same, or refused with the reason."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hydralora import HydraLoraConfig
from hydralora.tuner import hydralora_layers
from hydralora.tuner.lora_options import REFUSED
from tests.hydralora.tuner.kinds_of_layers import Attention, PackedLinear, tiny_gpt2, tiny_mamba
from tests.hydralora.tuner.models import IDS, MASK, adapted, logits, tiny_llama

pytestmark = pytest.mark.versions


def in_place(layer: nn.Module) -> nn.Module:
    """A model with this layer."""
    return nn.ModuleDict({"layer": layer})


def pair(kind: str) -> tuple[nn.Module, nn.Linear]:
    """A layer of 6 to 4 features and the plain linear layer that computes the same."""
    torch.manual_seed(1)
    plain = nn.Linear(6, 4)
    if kind == "Conv1D":
        layer = Conv1D(4, 6)
        with torch.no_grad():
            layer.weight.copy_(plain.weight.T)
            layer.bias.copy_(plain.bias)
        return layer, plain
    packed = PackedLinear(plain)
    with torch.no_grad():
        plain.weight.copy_(packed.unpacked())
        plain.bias.zero_()
    return packed, plain


@pytest.mark.parametrize("kind", ["Conv1D", "packed"])
@pytest.mark.parametrize("experts", [1, 3])
def test_a_kind_of_linear_layer_acts_as_the_plain_one(kind: str, experts: int) -> None:
    config = {"r": 2, "lora_nums": experts, "target_modules": ["layer"], "init_weights": False}
    models = []
    for layer in pair(kind):
        torch.manual_seed(2)
        models.append(get_peft_model(in_place(layer), HydraLoraConfig(**config)))
    x = torch.randn(3, 5, 6)
    outputs = [model.base_model.model["layer"](x) for model in models]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    bare = models[0].base_model.model["layer"].base_layer(x)
    assert not torch.allclose(outputs[0], bare, atol=1e-2)
    gradients = []
    for model, output in zip(models, outputs, strict=True):
        output.square().sum().backward()
        gradients.append({n: w.grad for n, w in model.named_parameters() if w.requires_grad})
        assert all(gradient.any() for gradient in gradients[-1].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    assert (models[0].base_model.model["layer"].in_features, models[0].base_model.model["layer"].out_features) == (6, 4)


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], ["attn.c_proj", "c_fc"]], ids=str)
def test_gpt2(targets: Any, tmp_path: Path) -> None:
    before = logits(tiny_gpt2())
    model = adapted(base=tiny_gpt2(), target_modules=targets)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert all(isinstance(layer.base_layer, Conv1D) for layer in hydralora_layers(model).values())
    assert len(hydralora_layers(model)) == {"all-linear": 8}.get(str(targets), 2 * len(targets))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path)).eval()
    assert torch.equal(logits(again), logits(model))


def test_one_expert_on_conv1d_is_lora_and_merges_in_the_stored_shape(tmp_path: Path) -> None:
    """Keys, shapes, outputs and the merged weight are those of PEFT's LoRA with fan_in_fan_out."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM"}
    lora = get_peft_model(tiny_gpt2(), LoraConfig(**options, fan_in_fan_out=True, init_lora_weights=False)).eval()
    lora.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = adapted(base=tiny_gpt2(), lora_nums=1, **options)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    loaded = ours.load_state_dict(
        {re.sub(r"\.weight$", ".default.weight", name): tensor for name, tensor in tensors.items()}, strict=False
    )
    assert not loaded.unexpected_keys
    assert torch.equal(logits(ours), logits(lora))
    name, layer = next(iter(hydralora_layers(ours).items()))
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape == (32, 96)
    torch.testing.assert_close(
        layer.get_delta_weight("default"), lora.get_submodule(name).get_delta_weight("default"), rtol=1e-5, atol=1e-7
    )
    outputs = logits(ours)
    ours.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(ours), outputs, rtol=0, atol=1e-4)
    ours.unmerge_adapter()
    torch.testing.assert_close(logits(ours), outputs, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(ours.merge_and_unload()), logits(lora.merge_and_unload()), rtol=0, atol=1e-4)


def test_an_approximate_merge_of_conv1d() -> None:
    model = adapted(base=tiny_gpt2(), target_modules="all-linear")
    report = model.merge("mean-routing", [{"input_ids": IDS, "attention_mask": MASK}])
    assert 0 < report.relative_error < 1
    model.unmerge_adapter()


@pytest.mark.parametrize("experts", [1, 3])
def test_a_packed_weight_is_never_merged_into(experts: int) -> None:
    layers = nn.ModuleDict({"plain": nn.Linear(6, 4), "packed": pair("packed")[0]})
    config = HydraLoraConfig(r=2, lora_nums=experts, target_modules=["plain", "packed"], init_weights=False)
    model = get_peft_model(layers, config)
    before = layers["plain"].base_layer.weight.clone()
    for attempt in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'packed' cannot be merged: PackedLinear keeps its weight packed"):
            attempt()
    assert torch.equal(layers["plain"].base_layer.weight, before)


def test_a_tied_output_layer_is_adapted_alone_and_never_merged_into() -> None:
    base = tiny_llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    before = logits(base)
    model = adapted(base=base, lora_nums=1, target_modules=["lm_head", "q_proj"])
    assert torch.equal(base.model.embed_tokens.weight, base.lm_head.base_layer.weight)
    changed = logits(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    with pytest.raises(ValueError, match=r"'lm_head' cannot be merged: its weight is shared \(.*embed_tokens.*Untie"):
        model.merge_and_unload()
    assert torch.equal(logits(model), changed)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("mha", "is a MultiheadAttention; it reads the weights of its projections and never calls them"),
        ("mha.out_proj", "is a NonDynamicallyQuantizableLinear of MultiheadAttention; it reads the weights"),
        ("conv", "is a Conv2d; it computes each position from a patch"),
        ("norm", "is a LayerNorm; HydraLoRA adapts linear layers"),
    ],
)
def test_other_layers_are_refused_with_the_reason(target: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        get_peft_model(Attention(), HydraLoraConfig(target_modules=[target]))
    assert f"'{target}'" in str(raised.value)
    assert "all-linear" not in str(raised.value)  # who asked for all of them is not advised to ask for all of them


def test_an_embedding_is_refused_with_what_can_be_done_instead() -> None:
    with pytest.raises(ValueError, match=r"is a Embedding; its input is a token's number.*modules_to_save.*indices"):
        adapted(target_modules=["embed_tokens"])


def test_layers_that_fused_kernels_read_are_refused_as_for_lora() -> None:
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        adapted(base=tiny_mamba(), target_modules=["out_proj"])


@pytest.mark.parametrize(("base", "targets"), [(tiny_llama, {"q_proj", "v_proj"}), (tiny_gpt2, {"c_attn"})])
def test_default_targets_are_those_of_lora(base: Any, targets: set[str]) -> None:
    model = adapted(base=base(), target_modules=None)
    assert {name.rpartition(".")[2] for name in hydralora_layers(model)} == targets


def test_an_architecture_without_default_targets_needs_some() -> None:
    with pytest.raises(ValueError, match="specify `target_modules`"):
        adapted(base=tiny_mamba(), target_modules=None)


def test_new_tokens_are_trained_and_saved_along(tmp_path: Path) -> None:
    model = adapted(trainable_token_indices=[5, 9]).train()
    embedding = tiny_llama().model.embed_tokens.weight
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.5)
    model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert torch.equal(logits(again), logits(model))
    rows = again.get_input_embeddings()(torch.arange(80))
    moved = (rows != embedding).any(dim=1).nonzero().flatten().tolist()
    assert moved == [5, 9]


def test_trained_tokens_stay_when_one_expert_is_merged() -> None:
    model = adapted(lora_nums=1, trainable_token_indices=[5, 9])
    with torch.no_grad():
        next(w for name, w in model.named_parameters() if "trainable_tokens_delta" in name).add_(0.5)
    expected = logits(model)
    assert not torch.allclose(expected, logits(adapted(lora_nums=1)), atol=1e-3)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_options_of_lora_are_refused_with_the_reason(name: str) -> None:
    for value in (True, None):
        with pytest.raises(ValueError, match=f"does not have these options of LoRA. {name}: ") as raised:
            HydraLoraConfig(**{name: value})
        assert isinstance(raised.value, TypeError)
        assert REFUSED[name] in str(raised.value)


def test_every_option_of_lora_is_there_or_has_a_reason() -> None:
    ours = {item.name for item in dataclasses.fields(HydraLoraConfig)}
    theirs = {item.name for item in dataclasses.fields(LoraConfig)}
    assert theirs - ours <= set(REFUSED)
    assert not ours & set(REFUSED)
    assert set(REFUSED) <= theirs


def test_what_no_method_has_is_an_unknown_argument() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'lora_rank'"):
        HydraLoraConfig(lora_rank=3)
