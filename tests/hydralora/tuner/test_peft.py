"""PEFT's contract: a table of configurations times a battery, with negative controls.

Every adapter here is drawn, not the identity, unless the test says so: an identity would pass most of these tests.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from hydralora import HydraLoraConfig, HydraLoraModel
from hydralora.tuner import hydralora_layers
from hydralora.tuner.registration import register
from tests.checkpointed import checkpoint_layers
from tests.hydralora.tuner.models import IDS, MASK, TARGETS, adapted, as_earlier, logits, tiny_llama

pytestmark = pytest.mark.versions

CASES: dict[str, dict[str, Any]] = {
    "several layers": {},
    "one expert": {"lora_nums": 1},
    "eight experts of rank 2": {"lora_nums": 8, "r": 2},
    "one module": {"target_modules": ["up_proj"]},
    "by pattern": {"target_modules": r".*\.1\.self_attn\.[qkvo]_proj"},
    "one layer of two": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear but one": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "by sequence": {"routing": "sequence"},
    "head trained along": {"modules_to_save": ["lm_head"]},
}
each_case = pytest.mark.parametrize("case", CASES)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def test_registering_twice_is_harmless() -> None:
    register(HydraLoraConfig, HydraLoraModel)
    assert PeftType("HYDRALORA") is PeftType.HYDRALORA
    assert PeftType.HYDRALORA == "HYDRALORA"
    with pytest.raises(RuntimeError, match="already"):
        register(LoraConfig, HydraLoraModel)


def test_a_fresh_process_knows_the_method_after_the_import(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path, save_embedding_layers=False)
    program = f"from peft import PeftConfig; print(type(PeftConfig.from_pretrained({str(tmp_path)!r})).__name__)"
    run = lambda code: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: E731
    without, with_import = run(program), run("import hydralora; " + program)
    assert "KeyError" in without.stderr
    assert with_import.stdout.strip() == "HydraLoraConfig"


@each_case
def test_identity_at_the_start(case: str) -> None:
    base = tiny_llama()
    before = logits(base)
    model = adapted(base=base, **CASES[case] | {"init_weights": True})
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(adapted(**CASES[case])), before, atol=1e-3)


@each_case
def test_one_step_moves_exactly_what_is_declared(case: str) -> None:
    model = adapted(**CASES[case]).train()
    before = state(model)
    declared = {name for name, weight in model.named_parameters() if weight.requires_grad}
    layers = hydralora_layers(model)
    expected = {
        f"{name}.{part}.default.weight"
        for name, layer in layers.items()
        for part in layer.adapter_layer_names
        if "default" in getattr(layer, part)
    }
    expected |= {n for n in before if "modules_to_save" in n}
    assert declared == expected
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.5)
    model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == expected
    assert any(name.endswith("lora_router.default.weight") for name in expected) == (CASES[case].get("lora_nums") != 1)


def test_the_stored_keys() -> None:
    """The file format: these names and shapes must never change."""
    stored = get_peft_model_state_dict(adapted(target_modules=["gate_proj"]), save_embedding_layers=False)
    prefix = "base_model.model.model.layers"
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        f"{prefix}.{layer}.mlp.gate_proj.{name}": shape
        for layer in (0, 1)
        for name, shape in {
            "lora_A.weight": (4, 32),
            "lora_B.weight": (48, 3 * 4),
            "lora_router.weight": (3, 32),
        }.items()
    }


def test_one_expert_has_the_stored_keys_of_lora() -> None:
    names = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    stored = [
        {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
        for model in (adapted(lora_nums=1), get_peft_model(tiny_llama(), LoraConfig(**names)))
    ]
    assert stored[0] == stored[1]


@each_case
@pytest.mark.parametrize("name", ["default", "other"])
def test_files_of_earlier_versions(case: str, name: str, tmp_path: Path) -> None:
    model = adapted(**CASES[case])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    saved = {key: tensors.pop(key) for key in list(tensors) if ".lora_" not in key}  # of `modules_to_save`
    earlier = as_earlier(tensors, CASES[case].get("lora_nums", 3))
    assert not earlier.keys() & tensors.keys()
    save_file(earlier | saved, path)
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), adapter_name=name).eval()
    assert torch.equal(logits(again), logits(model))


@each_case
@pytest.mark.parametrize("name", ["default", "other"])
def test_save_and_load(case: str, name: str, tmp_path: Path) -> None:
    model = adapted(**CASES[case])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), adapter_name=name).eval()
    assert torch.equal(logits(again), logits(model))
    assert not any(weight.requires_grad for weight in again.parameters())
    for field in ("r", "lora_alpha", "lora_nums", "routing", "target_modules"):
        assert getattr(again.peft_config[name], field) == getattr(model.peft_config["default"], field)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_adapter_beside_another(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    first, second = adapted(seed=1), adapted(seed=2, lora_nums=2, r=3)
    second.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = logits(first), logits(second)
    assert not torch.allclose(*expected, atol=1e-3)
    first.load_adapter(str(tmp_path), adapter_name="second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(first), expected[0])
    first.set_adapter("second")
    assert torch.equal(logits(first), expected[1])
    first.save_pretrained(tmp_path / "both", save_embedding_layers=False)
    stored = load_file(tmp_path / "both" / "second" / "adapter_model.safetensors")
    assert stored.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


def test_two_active_adapters_add_up() -> None:
    model = adapted()
    config = HydraLoraConfig(r=2, lora_nums=2, target_modules=["q_proj"], init_weights=False)
    model.add_adapter("second", config)
    layer = next(layer for layer in hydralora_layers(model).values() if "second" in layer.lora_A)
    x = torch.randn(2, 5, 32)
    model.base_model.set_adapter(["default", "second"])
    both = layer(x) - layer.base_layer(x)
    parts = [layer.update(name, x) for name in ("default", "second")]
    torch.testing.assert_close(both, parts[0] + parts[1], rtol=0, atol=1e-6)


def test_disable_delete_unload() -> None:
    base = tiny_llama()
    plain, classes = logits(base), {name: type(module) for name, module in base.named_modules()}
    model = adapted(base=base)
    changed = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), changed)
    model.add_adapter("second", HydraLoraConfig(target_modules=TARGETS, init_weights=False))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    for layer in hydralora_layers(model).values():
        for part in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "default" not in getattr(layer, part)
    unloaded = model.unload()
    assert unloaded is base
    assert {name: type(module) for name, module in unloaded.named_modules()} == classes
    assert torch.equal(logits(unloaded), plain)


@each_case
def test_merging_is_refused_before_any_weight_is_touched(case: str) -> None:
    model = adapted(**CASES[case])
    before, outputs = state(model), logits(model)
    if CASES[case].get("lora_nums") == 1:
        model.merge_adapter()
        torch.testing.assert_close(logits(model), outputs, rtol=0, atol=1e-4)
        assert not all(torch.equal(model.state_dict()[name], before[name]) for name in before)
        model.unmerge_adapter()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=1e-6)
        torch.testing.assert_close(logits(model.merge_and_unload()), outputs, rtol=0, atol=1e-4)
        return
    for attempt in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(["default"])):
        with pytest.raises(ValueError, match="cannot be merged: the router weights the experts for every"):
            attempt()
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert torch.equal(logits(model), outputs)


def test_one_expert_is_exactly_lora() -> None:
    ours = adapted(lora_nums=1)
    torch.manual_seed(0)
    names = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    lora = get_peft_model(tiny_llama(), LoraConfig(**names)).eval()
    for name, layer in hydralora_layers(ours).items():
        other = lora.get_submodule(name)
        other.lora_A["default"].weight.data.copy_(layer.lora_A["default"].weight)
        other.lora_B["default"].weight.data.copy_(layer.lora_B["default"].weight)
    assert torch.equal(logits(ours), logits(lora))
    for model in (ours, lora):
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    for name, layer in hydralora_layers(ours).items():
        other = lora.get_submodule(name)
        torch.testing.assert_close(
            layer.lora_A["default"].weight.grad, other.lora_A["default"].weight.grad, rtol=1e-5, atol=1e-8
        )
        torch.testing.assert_close(
            layer.lora_B["default"].weight.grad, other.lora_B["default"].weight.grad, rtol=1e-5, atol=1e-8
        )


def two_adapters(**changes: Any) -> PeftModel:
    model = adapted(**changes)
    torch.manual_seed(7)
    config = HydraLoraConfig(r=3, lora_nums=2, target_modules=["q_proj", "up_proj"], init_weights=False, **changes)
    model.add_adapter("second", config)
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"routing": "sequence"}], ids=["by token", "by sequence"])
def test_rows_of_a_batch_with_adapters_of_their_own(changes: dict[str, Any]) -> None:
    model = two_adapters(**changes)
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        mixed = model(input_ids=IDS, attention_mask=MASK, adapter_names=names).logits
        expected = {}
        for name in ("default", "second"):
            model.set_adapter(name)
            expected[name] = model(input_ids=IDS, attention_mask=MASK).logits
        with model.disable_adapter():
            expected["__base__"] = model(input_ids=IDS, attention_mask=MASK).logits
    for row, name in enumerate(names):
        valid = MASK[row].bool()
        torch.testing.assert_close(mixed[row][valid], expected[name][row][valid], rtol=0, atol=1e-5)
        others = [expected[other][row][valid] for other in expected if other != name]
        assert not any(torch.allclose(mixed[row][valid], other, atol=1e-3) for other in others)


@pytest.mark.parametrize("changes", [{}, {"routing": "sequence"}], ids=["by token", "by sequence"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_adapters_of_their_own(beams: int, changes: dict[str, Any]) -> None:
    model = two_adapters(**changes)
    ids = IDS[:, :3]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mixed = model.generate(**inputs, adapter_names=["default", "second", "default"], **options)
    for name, rows in (("default", [0, 2]), ("second", [1])):
        model.set_adapter(name)
        assert torch.equal(mixed[rows], model.generate(**inputs, **options)[rows])


def test_no_hook_stays_behind_after_an_error() -> None:
    model = two_adapters()
    hooks = lambda: sum(len(module._forward_pre_hooks) for module in model.modules())  # noqa: E731
    before, plain = hooks(), logits(model)
    with pytest.raises(ValueError, match="3 rows"):
        model(input_ids=IDS, attention_mask=MASK, adapter_names=["second", "default"])
    with pytest.raises(ValueError, match=r"there is no adapter \['third'\]"):
        model(input_ids=IDS, attention_mask=MASK, adapter_names=["third"] * 3)
    with pytest.raises(ValueError, match="for inference"):
        model.train()(input_ids=IDS, attention_mask=MASK, adapter_names=["second"] * 3)
    assert hooks() == before
    assert torch.equal(logits(model.eval()), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes(dtype: torch.dtype, autocast: bool) -> None:
    """Adapters of a half-precision base are fp32 unless PEFT is told otherwise; outputs keep the dtype of the base."""
    base = tiny_llama().to(dtype)
    config = HydraLoraConfig(r=4, lora_nums=3, target_modules=TARGETS, init_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast).eval()
    kept = {weight.dtype for name, weight in model.named_parameters() if ".lora_" in name}
    assert kept == {torch.float32 if autocast else dtype}
    layer = next(iter(hydralora_layers(model).values()))
    x = torch.randn(2, 3, 32, dtype=dtype)
    assert layer(x).dtype == dtype
    assert layer.route("default", x.to(next(iter(kept)))).dtype == torch.float32
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_gradient_checkpointing_keeps_the_gradients(routing: str) -> None:
    gradients = {}
    for checkpointing in (False, True):
        model = adapted(routing=routing).train()
        if checkpointing:
            checkpoint_layers(model)
            model.enable_input_require_grads()
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        gradients[checkpointing] = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-5, atol=1e-8)
    assert any(gradient.any() for gradient in gradients[True].values())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits: int, tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("the extra `quant` is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    options = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**options))
    model = adapted(base=quantised).train()
    loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    optimizer.step()
    assert model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss < loss


def test_another_architecture() -> None:
    """Nothing is particular to Llama: GPT-NeoX has one fused projection with a bias."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=80, **sizes)).eval()
    before = logits(base)
    model = adapted(base=base, target_modules=["query_key_value", "dense_4h_to_h"])
    assert len(hydralora_layers(model)) == 4
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"r is 0.*lora_nums is 0.*lora_dropout is 1.*routing is 'word'.*bias is 'some'"
    ):
        HydraLoraConfig(r=0, lora_nums=0, lora_dropout=1.0, routing="word", bias="some")


def test_injection_driven_by_a_state_dict() -> None:
    model = adapted()
    stored = get_peft_model_state_dict(model, save_embedding_layers=False)
    stripped = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
    base = tiny_llama()
    inject_adapter_in_model(model.peft_config["default"], base, state_dict=stripped)
    set_peft_model_state_dict(base, stripped)
    assert torch.equal(logits(base.eval()), logits(model))


def test_a_copy_is_independent() -> None:
    model = adapted(routing="sequence")
    before = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in hydralora_layers(other).values():
            layer.expert_matrices("default").mul_(2)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(other), before, atol=1e-3)


def test_the_tested_versions_of_peft() -> None:
    assert peft.__version__.startswith("0.21.")
