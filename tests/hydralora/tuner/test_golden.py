"""The tuner against the original's layer, model and checkpoint.

Tolerances are those of `tests/golden/hydralora/README.md` or tighter; measured in fp32: layers 2e-6 relative, logits
1.1e-5 absolute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hydralora import convert
from hydralora.layer import routed_low_rank
from hydralora.tuner import HydraLoraConfig, Linear, hydralora_layers
from hydralora.tuner.original import config_to_original, from_original, to_original
from hydralora.tuner.passes import Passes
from tests.golden import load_case

pytestmark = pytest.mark.versions

LAYERS = ["linear_n1", "linear_n3", "linear_n4", "linear_n3_bias_r2", "linear_n4_bf16"]
MODELS = ["llama_n1", "llama_n3"]


def section(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def build_layer(case: dict[str, Any], weights: dict[str, Tensor]) -> Linear:
    """Our layer with the weights of a case."""
    settings = case["hyper_parameters"]
    dtype = getattr(torch, settings["dtype"])
    base = nn.Linear(settings["in_features"], settings["out_features"], bias=settings["bias"], dtype=dtype)
    base.load_state_dict({name: weights[name] for name in base.state_dict()})
    base.requires_grad_(False)
    names = ("r", "lora_alpha", "lora_nums", "lora_dropout")
    layer = Linear(base, "default", HydraLoraConfig(**{name: settings[name] for name in names}), Passes())
    ours = from_original({f"x.{name}": tensor for name, tensor in weights.items() if name.startswith("lora_")}, "case")
    for name in Linear.adapter_layer_names:
        if "default" in getattr(layer, name):
            getattr(layer, name)["default"].weight.data.copy_(ours[f"x.{name}.weight"])
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    case, tensors = load_case("hydralora", name)
    layer = build_layer(case, section(tensors, "w"))
    x = tensors["in/x"].clone().requires_grad_()
    y = layer(x)
    assert y.dtype == tensors["out/y"].dtype
    half = y.dtype == torch.bfloat16
    close = {"rtol": 2e-2, "atol": 5e-2} if half else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(y, tensors["out/y"], **close)
    torch.testing.assert_close(layer.route("default", x), tensors["out/route"].float(), **close)
    (y * tensors["in/cotangent"]).sum().backward()
    gradients = {
        f"x.{part}.weight": getattr(layer, part)["default"].weight.grad
        for part in Linear.adapter_layer_names
        if "default" in getattr(layer, part)
    }
    ours = {"x": x.grad} | {key.removeprefix("x."): value for key, value in to_original(gradients).items()}
    expected = section(tensors, "grad")
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        largest = float(gradient.abs().max())
        close = {"rtol": 2e-2, "atol": 5e-2 * max(1, largest)} if half else {"rtol": 0, "atol": 1e-5 * largest}
        torch.testing.assert_close(ours[key], gradient, **close)


def test_dropout_is_that_of_the_formula() -> None:
    """With the original's masks, one per expert, the sum of our single experts is its output."""
    case, tensors = load_case("hydralora", "linear_n3_dropout")
    layer = build_layer(case, section(tensors, "w"))
    shared_a, experts_b = layer.lora_A["default"].weight, layer.expert_matrices("default")
    weights = layer.route("default", tensors["in/x"]) * layer.scaling["default"]
    y = layer.base_layer(tensors["in/x"])
    for number in range(3):
        one = slice(number, number + 1)
        y = y + routed_low_rank(tensors[f"out/dropped_x_{number}"], shared_a, experts_b[one], weights[..., one])
    torch.testing.assert_close(y, tensors["out/y"], rtol=1e-6, atol=1e-6)
    # Ours draws one mask for all experts, and none in evaluation.
    layer.train()
    torch.manual_seed(0)
    dropped = layer(tensors["in/x"])
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(tensors["in/x"], 0.3)
    expected = layer.base_layer(tensors["in/x"]) + routed_low_rank(kept, shared_a, experts_b, weights)
    torch.testing.assert_close(dropped, expected, rtol=1e-5, atol=1e-5)  # measured: 1.7e-6
    assert not torch.equal(dropped, layer.eval()(tensors["in/x"]))


def load_model(name: str, folder: Path) -> tuple[PeftModel, dict[str, Any], dict[str, Tensor]]:
    """The original's checkpoint folder, converted by the program, on a stock Llama."""
    case, tensors = load_case("hydralora", name)
    weights = section(tensors, "w")
    original = folder / "original"
    original.mkdir()
    torch.save({key: weights[key] for key, _, _ in case["checkpoint"]["keys"]}, original / "adapter_model.bin")
    (original / "adapter_config.json").write_text(json.dumps(case["checkpoint"]["adapter_config"]))
    convert.main(["from-original", str(original), str(folder / "ours")])
    base = LlamaForCausalLM(LlamaConfig(**case["hyper_parameters"]["llama"]))
    prefix = "base_model.model."
    base.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if ".lora_" not in k})
    return PeftModel.from_pretrained(base, str(folder / "ours"), is_trainable=True).eval(), case, tensors


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tmp_path: Path) -> None:
    model, case, tensors = load_model(name, tmp_path)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # The original has a router for one expert, too, whose gradient is zero.
    layers = hydralora_layers(model).values()
    lone_routers = sum(layer.in_features for layer in layers if layer.experts["default"] == 1)
    assert sum(p.numel() for p in trainable.values()) + lone_routers == case["n_trainable"]
    mask = tensors["in/attention_mask"]
    out = model(input_ids=tensors["in/input_ids"], attention_mask=mask, labels=tensors["in/labels"])
    assert out.loss.item() == pytest.approx(case["loss"], abs=1e-6)
    torch.testing.assert_close(out.logits[mask], tensors["out/logits"][mask], rtol=0, atol=3e-5)
    out.loss.backward()
    ours = to_original({n.replace(".default", ""): p.grad for n, p in trainable.items()})
    expected = section(tensors, "grad")
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(ours[key], gradient, rtol=0, atol=1e-5 * max(1e-3, float(gradient.abs().max())))
    prompt, expected_ids = tensors["in/prompt"], tensors["out/greedy_by_full_forward"]
    new = expected_ids.shape[1] - prompt.shape[1]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(generated, expected_ids)


@pytest.mark.parametrize("name", MODELS)
def test_the_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    load_model(name, tmp_path)
    convert.main(["to-original", str(tmp_path / "ours"), str(tmp_path / "again")])
    first, second = (torch.load(tmp_path / f / "adapter_model.bin", weights_only=True) for f in ("original", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("original", "again")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    load_model("llama_n1", tmp_path)
    target = str(tmp_path / "target")
    with pytest.raises(SystemExit, match="already exists"):
        convert.main(["from-original", str(tmp_path / "original"), str(tmp_path / "ours")])
    with pytest.raises(SystemExit, match="no configuration of the original"):
        convert.main(["from-original", str(tmp_path / "ours"), target])
    with pytest.raises(SystemExit, match="is no HydraLoRA adapter"):
        convert.main(["to-original", str(tmp_path / "original"), target])
    path = tmp_path / "original" / "adapter_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in tensors.items() if "lora_B0" not in k}, path)
    with pytest.raises(SystemExit, match="incomplete"):
        convert.main(["from-original", str(tmp_path / "original"), target])
    path.unlink()
    with pytest.raises(SystemExit, match=r"adapter_model\.bin: cannot be read"):
        convert.main(["from-original", str(tmp_path / "original"), target])
    (tmp_path / "ours" / "adapter_model.safetensors").write_text("damaged")
    with pytest.raises(SystemExit, match=r"adapter_model\.safetensors: is damaged"):
        convert.main(["to-original", str(tmp_path / "ours"), target])
    assert not (tmp_path / "target").exists()
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    "choice",
    [{"exclude_modules": ["k_proj"]}, {"layers_to_transform": [0]}, {"layers_to_transform": 0}],
    ids=str,
)
def test_what_the_original_cannot_say_is_not_exported(choice: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(choice))):
        config_to_original(HydraLoraConfig(target_modules=["q_proj"], **choice))
    assert config_to_original(HydraLoraConfig(target_modules=["q_proj"]))["target_modules"] == ["q_proj"]
