"""What of PEFT works with HydraLoRA, each tried by a small function: the table in `hydralora/README.md`.

A function that returns has seen the feature work; one that ends in a refusal gives its words. `python -m
tests.hydralora.tuner.features` writes the table; a test compares it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.optimizers import create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from hydralora import HydraLoraConfig
from hydralora.tuner import hydralora_layers
from hydralora.tuner.lora_options import REFUSED, RefusedOptionError
from tests.checkpointed import checkpoint_layers
from tests.hydralora.tuner.kinds_of_layers import Attention, PackedLinear, tiny_gpt2
from tests.hydralora.tuner.models import IDS, MASK, TARGETS, adapted, logits, tiny_llama

README = Path(__file__).resolve().parents[3] / "hydralora" / "README.md"
BEGIN, END = "<!-- features: begin -->\n", "<!-- features: end -->\n"
REFUSALS = (ValueError, TypeError, NotImplementedError)
Feature = Callable[[Path], None]


def options(**changes: Any) -> HydraLoraConfig:
    return HydraLoraConfig(**{"r": 3, "lora_nums": 2, "target_modules": TARGETS, "init_weights": False} | changes)


def differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return not torch.allclose(first, second, atol=1e-3)


def stored(folder: Path, **changes: Any) -> tuple[PeftModel, torch.Tensor]:
    model = adapted(**changes)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model, logits(model)


def loss_and_gradients(model: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, attention_mask=MASK, labels=IDS, **kwargs).loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    return found


def save_and_load(folder: Path) -> None:
    _, expected = stored(folder)
    again = PeftModel.from_pretrained(tiny_llama(), str(folder), adapter_name="other").eval()
    assert torch.equal(logits(again), expected)


def low_memory(folder: Path) -> None:
    _, expected = stored(folder)
    again = PeftModel.from_pretrained(tiny_llama(), str(folder), low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(again), expected)


def several(folder: Path) -> None:
    model = adapted()
    first = logits(model)
    model.add_adapter("second", options())
    model.set_adapter("second")
    second = logits(model.eval())
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert differ(first, second)
    assert differ(both, first)
    assert differ(both, second)


def two() -> PeftModel:
    model = adapted()
    model.add_adapter("second", options())
    return model.eval()


def added_up(folder: Path) -> None:
    model = two()
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)


def added_up_by_svd(folder: Path) -> None:
    two().add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="svd")


def disabling(folder: Path) -> None:
    model, before = adapted(), logits(tiny_llama())
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert differ(logits(model), before)


def deleting(folder: Path) -> None:
    model, before = adapted(), logits(tiny_llama())
    model.add_adapter("second", options())
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    assert not any("default" in name for name in model.state_dict())
    assert torch.equal(logits(model.unload()), before)


def by_row(folder: Path) -> None:
    model = two()
    with torch.no_grad():
        mixed = model(input_ids=IDS, attention_mask=MASK, adapter_names=["default", "second", "__base__"]).logits
        alone = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(mixed[0], alone[0], rtol=0, atol=1e-5)
    assert differ(mixed[1], alone[1])
    assert differ(mixed[2], alone[2])


def trained_modules(folder: Path) -> None:
    model, expected = stored(folder, modules_to_save=["lm_head"])
    assert model.lm_head.modules_to_save["default"].weight.requires_grad
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()), expected)


def trained_tokens(folder: Path) -> None:
    found = loss_and_gradients(adapted(trainable_token_indices=[5, 9]).train())
    assert [tuple(w.shape) for name, w in found.items() if "token_adapter" in name] == [(2, 32)]


def every_linear(folder: Path) -> None:
    model = adapted(target_modules="all-linear", exclude_modules=["down_proj"])
    assert len(hydralora_layers(model)) == 2 * 6
    model = adapted(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert list(hydralora_layers(model)) == ["base_model.model.model.layers.1.self_attn.q_proj"]


def default_targets(folder: Path) -> None:
    names = {name.rpartition(".")[2] for name in hydralora_layers(adapted(target_modules=None))}
    assert names == {"q_proj", "v_proj"}


def conv1d(folder: Path) -> None:
    model = adapted(base=tiny_gpt2(), target_modules="all-linear")
    assert len(hydralora_layers(model)) == 8
    loss_and_gradients(model.train())


def packed(folder: Path) -> None:
    base = tiny_llama()
    for layer in base.model.layers:
        layer.mlp.down_proj = PackedLinear(layer.mlp.down_proj)
    before = logits(base)
    model = adapted(base=base, target_modules=["down_proj"])
    assert differ(logits(model), before)
    loss_and_gradients(model.train())


def bits(which: str) -> Feature:
    def quantised(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
        quantization = BitsAndBytesConfig(**{f"load_in_{which}": True})
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
        loss_and_gradients(adapted(base=model).train())

    return quantised


def half(folder: Path) -> None:
    model = adapted(base=tiny_llama().to(torch.bfloat16))
    assert {w.dtype for name, w in model.named_parameters() if ".lora_" in name} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def checkpointing(folder: Path) -> None:
    plain, recomputed = adapted().train(), adapted().train()
    checkpoint_layers(recomputed)
    recomputed.enable_input_require_grads()
    torch.testing.assert_close(loss_and_gradients(plain), loss_and_gradients(recomputed), rtol=1e-5, atol=1e-7)


def compiled(folder: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    model = get_peft_model(base, options(target_modules=["0", "2"]))
    faster = torch.compile(model, backend="aot_eager")
    x, outputs, gradients = torch.randn(3, 5, 8), [], []
    for forward in (model, faster):
        model.zero_grad()
        outputs.append(forward(x))
        outputs[-1].square().sum().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.requires_grad])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def injected(folder: Path) -> None:
    model = adapted()
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    base = inject_adapter_in_model(model.peft_config["default"], tiny_llama())
    set_peft_model_state_dict(base, {name.removeprefix("base_model.model."): t for name, t in tensors.items()})
    assert torch.equal(logits(base.eval()), logits(model))


def loaded_by_transformers(folder: Path) -> None:
    _, expected = stored(folder)
    base = tiny_llama()
    base.load_adapter(str(folder), adapter_name="first")
    assert torch.equal(logits(base.eval()), expected)


def of_transformers(folder: Path) -> None:
    # Some versions ask for a later PEFT than any that there is, whatever the method.
    with mock.patch("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0"):
        base = tiny_llama()
        before = logits(base)
        base.add_adapter(options(), adapter_name="first")
        first = logits(base.eval())
        base.disable_adapters()
        assert torch.equal(logits(base), before)
        base.enable_adapters()
        base.add_adapter(options(), adapter_name="second")
        base.set_adapter("second")
        assert differ(logits(base.eval()), first)
        base.set_adapter("first")
        assert torch.equal(logits(base), first)


def auto(folder: Path) -> None:
    tiny_llama().save_pretrained(folder / "base")
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    again = AutoPeftModelForCausalLM.from_pretrained(str(folder / "adapter")).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def classifier(folder: Path) -> None:
    config = LlamaConfig(**tiny_llama().config.to_dict() | {"num_labels": 3})
    model = get_peft_model(LlamaForSequenceClassification(config), options(task_type="SEQ_CLS"))
    model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert model.base_model.model.score.modules_to_save["default"].weight.grad.any()


def status(folder: Path) -> None:
    found = adapted().get_model_status()
    assert (found.peft_types, found.active_adapters, found.enabled) == ({"default": "HYDRALORA"}, ["default"], True)


def lora_plus(folder: Path) -> None:
    optimizer = create_loraplus_optimizer(adapted(), torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16)
    faster = [weight for group in optimizer.param_groups if group["lr"] == 1.6e-2 for weight in group["params"]]
    assert {weight.shape[1] for weight in faster} == {3 * 4}  # the B, of width E * r


def one_expert(folder: Path) -> None:
    model = adapted(lora_nums=1)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), expected, rtol=0, atol=1e-4)


def several_experts(folder: Path) -> None:
    adapted().merge_and_unload()


def approximately(folder: Path) -> None:
    report = adapted().merge("mean-routing", [{"input_ids": IDS, "attention_mask": MASK}])
    assert 0 < report.relative_error < 1


def tied(folder: Path) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    before = base.model.embed_tokens.weight.clone()
    loss_and_gradients(adapted(base=base, target_modules=["lm_head"]).train())
    assert torch.equal(base.model.embed_tokens.weight, before)


def merged_tied(folder: Path) -> None:
    adapted(base=tiny_llama(tie_word_embeddings=True), lora_nums=1, target_modules=["lm_head"]).merge_and_unload()


def merged_packed(folder: Path) -> None:
    base = nn.ModuleDict({"layer": PackedLinear(nn.Linear(6, 4))})
    get_peft_model(base, options(target_modules=["layer"], lora_nums=1)).merge_and_unload()


def attach(base: nn.Module, name: str) -> None:
    get_peft_model(base, options(target_modules=[name]))


def target(name: str) -> Feature:
    return lambda folder: attach(Attention(), name)


def option(name: str) -> Feature:
    def given(folder: Path) -> None:
        try:
            HydraLoraConfig(**{name: True})
        except RefusedOptionError as error:
            raise ValueError(str(error).partition(f" {name}: ")[2]) from error

    return given


def swapped(folder: Path) -> None:
    _, expected = stored(folder, seed=5)
    model = adapted()
    assert differ(logits(model), expected)
    hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model), expected)


def prepared(folder: Path) -> None:
    _, expected = stored(folder, seed=5, r=2)
    model = adapted()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


def mixed(folder: Path) -> None:
    get_peft_model(tiny_llama(), options(), mixed=True)


FEATURES: dict[str, Feature] = {
    "`save_pretrained`, `from_pretrained`, under any adapter's name": save_and_load,
    "`low_cpu_mem_usage=True`": low_memory,
    "several adapters, switched or active together": several,
    "`disable_adapter`": disabling,
    "`delete_adapter`, `unload`": deleting,
    "`adapter_names`, an adapter for each row of a batch": by_row,
    "`modules_to_save`": trained_modules,
    "`trainable_token_indices`": trained_tokens,
    "`target_modules='all-linear'`, `exclude_modules`, `layers_to_transform`, `layers_pattern`": every_linear,
    "no `target_modules`: LoRA's for the architecture": default_targets,
    "`Conv1D` of GPT-2": conv1d,
    "4-bit base of bitsandbytes": bits("4bit"),
    "8-bit base of bitsandbytes": bits("8bit"),
    "layers with a packed weight, as of GPTQ and AWQ": packed,
    "half-precision base, float32 adapter": half,
    "gradient checkpointing": checkpointing,
    "`torch.compile`": compiled,
    "`inject_adapter_in_model`": injected,
    "`load_adapter` of a transformers model": loaded_by_transformers,
    "`add_adapter`, `set_adapter`, `disable_adapters` of a transformers model that admits this PEFT": of_transformers,
    "`AutoPeftModelForCausalLM`": auto,
    "classifiers (`task_type='SEQ_CLS'`)": classifier,
    "`get_model_status`": status,
    "`create_loraplus_optimizer`": lora_plus,
    "`add_weighted_adapter`": added_up,
    "`add_weighted_adapter` with another `combination_type` than `cat`": added_up_by_svd,
    "merging one expert": one_expert,
    "merging several experts": several_experts,
    "`merge('mean-routing', inputs)`, approximately": approximately,
    "an output layer that is tied to the embedding": tied,
    "merging into a tied layer": merged_tied,
    "merging into a packed weight": merged_packed,
    "embeddings": lambda folder: attach(tiny_llama(), "embed_tokens"),
    "convolutions": target("conv"),
    "`torch.nn.MultiheadAttention`": target("mha"),
    "`hotswap_adapter`": swapped,
    "`prepare_model_for_compiled_hotswap`": prepared,
    "`PeftMixedModel`": mixed,
    **{f"`{name}` of `LoraConfig`": option(name) for name in sorted(REFUSED)},
}


def needs_bitsandbytes(feature: str) -> bool:
    return "bitsandbytes" in feature and importlib.util.find_spec("bitsandbytes") is None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def found(feature: str) -> str:
    """`yes`, or the words of the refusal."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            FEATURES[feature](Path(folder))
        except REFUSALS as error:
            return " ".join(str(error).split())
    return "yes"


def row(feature: str, answer: str) -> str:
    return f"| {feature} | {answer if answer == 'yes' else f'refused: {answer}'} |\n"


def table() -> str:
    """The table as the README has it."""
    return "| feature of PEFT | HydraLoRA |\n| --- | --- |\n" + "".join(row(name, found(name)) for name in FEATURES)


def written() -> str:
    """The table that the README has."""
    return README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(BEGIN + written() + END, BEGIN + table() + END), encoding="utf-8")
