"""Adapters made stronger or weaker, and weighted sums of adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale

from hydralora import HydraLoraConfig
from hydralora.tuner import hydralora_layers, rescale
from tests.hydralora.tuner.models import TARGETS, adapted, logits, tiny_llama, tiny_opt

pytestmark = pytest.mark.versions


def as_lora(seed: int = 0) -> Any:
    """PEFT's LoRA with the weights of `adapted(seed, lora_nums=1)`."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    state = {name: value for name, value in adapted(seed, lora_nums=1).state_dict().items() if ".lora_" in name}
    model.load_state_dict(state, strict=False)
    return model.eval()


class TestScale:
    CALLS = (
        ("set_scale", ("default", 0.5), 0.5),
        ("set_scale", ("other", 0.5), 1.0),
        ("scale_layer", (0.25,), 0.25),
        ("unscale_layer", (2,), 0.5),
        ("unscale_layer", (), 1.0),
    )

    @pytest.mark.parametrize(("method", "arguments", "factor"), CALLS, ids=str)
    def test_methods_of_the_layers(self, method: str, arguments: tuple[Any, ...], factor: float) -> None:
        """Twice in a row: what multiplies does so twice, what sets is the same."""
        ours, peft = adapted(lora_nums=1), as_lora()
        torch.testing.assert_close(logits(ours), logits(peft), rtol=0, atol=0)
        for _ in range(2):
            for model, kind in ((ours, "hydralora"), (peft, "lora")):
                layers = [module for module in model.modules() if hasattr(module, method)]
                assert len(layers) == 8, kind
                for layer in layers:
                    getattr(layer, method)(*arguments)
            torch.testing.assert_close(logits(ours), logits(peft), rtol=0, atol=0)
        assert (factor == 1.0) == torch.equal(logits(ours), logits(adapted(lora_nums=1)))

    @pytest.mark.parametrize("experts", [1, 3])
    @pytest.mark.parametrize("multiplier", [0, 0.5, 2])
    def test_rescale(self, experts: int, multiplier: float) -> None:
        model = adapted(lora_nums=experts)
        before = logits(model)
        expected = adapted(lora_nums=experts, lora_alpha=8 * multiplier) if multiplier else tiny_llama()
        with rescale(model, multiplier):
            torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)
            assert not torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)

    def test_rescale_restores_after_an_error(self) -> None:
        model = adapted()
        before = logits(model)
        with pytest.raises(KeyError), rescale(model, 3):
            raise KeyError
        assert torch.equal(logits(model), before)

    def test_rescale_of_lora_is_that_of_peft(self) -> None:
        model = as_lora()
        with rescale_adapter_scale(model, 0.3):
            expected = logits(model)
        with rescale(model, 0.3):
            assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize(("value", "error"), [("2", TypeError), (True, TypeError), (float("nan"), ValueError)])
    def test_refused_values(self, value: Any, error: type[Exception]) -> None:
        model = adapted()
        layer = next(iter(hydralora_layers(model).values()))
        before = logits(model)
        for change in (lambda: layer.set_scale("default", value), lambda: layer.scale_layer(value)):
            with pytest.raises(error, match="scale is"):
                change()
        with pytest.raises(error, match="scale is"), rescale(model, value):
            pass
        assert torch.equal(logits(model), before)

    def test_refused_states(self) -> None:
        model = adapted(lora_nums=1)
        layer = next(iter(hydralora_layers(model).values()))
        with pytest.raises(ValueError, match="scale is 0"):
            layer.unscale_layer(0)
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            layer.set_scale("default", 2)
        with pytest.raises(ValueError, match="unmerge_adapter"), rescale(model, 2):
            pass
        with pytest.raises(ValueError, match="no HydraLoRA and no LoRA"), rescale(tiny_llama(), 2):
            pass


def pair(one: dict[str, Any] | None = None, other: dict[str, Any] | None = None, **both: Any) -> Any:
    """A model with two adapters, `default` and `b`."""
    model = adapted(**(one or {}), **both)
    torch.manual_seed(7)
    options = {"r": 4, "lora_alpha": 12, "lora_nums": 3, "target_modules": TARGETS, "init_weights": False}
    model.add_adapter("b", HydraLoraConfig(**options | both | (other or {})))
    return model.eval()


SUMS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "one expert each": ({"lora_nums": 1}, {"lora_nums": 1}, 8, 1),
    "several experts": ({}, {}, 8, 9),
    "other numbers of experts and ranks": ({"lora_nums": 2}, {"r": 2}, 6, 6),
    "one and several": ({"lora_nums": 1}, {}, 8, 3),
    "other layers": ({"target_modules": ["q_proj", "up_proj"]}, {}, 8, 9),
    "a pattern": ({"target_modules": r".*\.1\..*q_proj"}, {}, 8, 9),
    "by sequence": ({"routing": "sequence"}, {"routing": "sequence"}, 8, 9),
}
"""Options of both adapters; rank and experts of the sum."""


@pytest.mark.parametrize("kind", SUMS)
def test_weighted_sum(kind: str) -> None:
    """The update of each layer is the sum of the two, for the layer's own inputs; and so are the logits of both."""
    one, other, rank, experts = SUMS[kind]
    model = pair(one, other)
    alone = logits(model)
    model.base_model.set_adapter(["default", "b"])
    with torch.no_grad():
        both = logits(model)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    assert (model.peft_config["sum"].r, model.peft_config["sum"].lora_nums) == (rank, experts)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, rtol=0, atol=2e-6)
    assert (both - alone).abs().max() > 1e-3
    model.add_weighted_adapter(["default", "b"], [2, -0.5], "difference")
    model.set_adapter("difference")
    difference = logits(model)
    for layer in hydralora_layers(model).values():
        layer.set_scale("default", 2)
        layer.set_scale("b", -0.5)
    model.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(difference, logits(model), rtol=0, atol=2e-6)


def test_equal_routers_keep_the_number_of_experts() -> None:
    model = pair()
    for layer in hydralora_layers(model).values():
        layer.lora_router["b"].weight.data.copy_(layer.lora_router["default"].weight)
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    model.add_weighted_adapter(["default", "b"], [1, 1], "sum")
    assert model.peft_config["sum"].lora_nums == 3
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, rtol=0, atol=2e-6)


def test_a_sum_is_saved_and_trains_nothing(tmp_path: Any) -> None:
    from peft import PeftModel

    model = pair()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "sum")
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trained
    model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"], save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "sum")).eval()
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], tuple[Any, ...], str]] = {
    "an approximation": ({}, (["default", "b"], [1, 1], "sum", "svd"), "combination_type is 'svd'"),
    "no adapters": ({}, ([], [], "sum"), "expected a list of names"),
    "a text": ({}, ("default", [1], "sum"), "expected a list of names"),
    "an unknown adapter": ({}, (["default", "c"], [1, 1], "sum"), r"no adapter \['c'\]"),
    "one twice": ({}, (["b", "b"], [1, 1], "sum"), "names one twice"),
    "a weight less": ({}, (["default", "b"], [1], "sum"), "1 weights for 2"),
    "not a number": ({}, (["default", "b"], [1, float("inf")], "sum"), "finite"),
    "a known name": ({}, (["default", "b"], [1, 1], "b"), "already is an adapter 'b'"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, (["default", "b"], [1, 1], "sum"), "modules_to_save"),
    "another routing": ({"routing": "sequence"}, (["default", "b"], [1, 1], "sum"), "routing differs"),
    "the best of the experts": (
        {"top_k": 2},
        (["default", "b"], [1, 1], "sum"),
        r"adapters \['b'\] have top_k, top_p or",
    ),
    "the likeliest experts": ({"top_p": 0.5}, (["default", "b"], [1, 1], "sum"), r"adapters \['b'\] have top_k, top_p"),
    "by task": (
        {"routing": "task", "tasks": ["law", "math"]},
        (["default", "b"], [1, 1], "sum"),
        r"adapters \['b'\] have top_k, top_p or routing by task",
    ),
    "another temperature": (
        {"router_temperature": 2.0},
        (["default", "b"], [1, 1], "sum"),
        "router_temperature differs",
    ),
    "biases": ({"bias": "lora_only"}, (["default", "b"], [1, 1], "sum"), "trained biases cannot be added up"),
    "tokens": ({"trainable_token_indices": [5]}, (["default", "b"], [1, 1], "sum"), "trainable_token_indices"),
    "experts by layer": (
        {"experts_pattern": {"q_proj": 2}},
        (["default", "b"], [1, 1], "sum"),
        r"'b' has \[2, 3\] exp",
    ),
    "another dropout": ({"lora_dropout": 0.1}, (["default", "b"], [1, 1], "sum"), "lora_dropout differs"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_sums(kind: str) -> None:
    other, arguments, message = REFUSED[kind]
    model = pair({}, other)
    before = list(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == before
    assert all(set(layer.lora_A) <= set(before) for layer in hydralora_layers(model).values())


def test_merged_adapters_are_not_added_up() -> None:
    model = pair({"lora_nums": 1}, {"lora_nums": 1})
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match=r"\['b'\] are merged"):
        model.add_weighted_adapter(["default", "b"], [1, 1], "sum")


@pytest.mark.parametrize("opt", [False, True])
def test_one_expert_is_converted_by_peft(opt: bool) -> None:
    """`peft.convert_to_lora` of one expert gives the same model; of several it refuses."""
    base, targets = (tiny_opt, ["fc1", "q_proj"]) if opt else (tiny_llama, TARGETS)
    model = adapted(base=base(), target_modules=targets, lora_nums=1)
    model.add_adapter("routed", HydraLoraConfig(r=4, lora_nums=2, target_modules=targets, init_weights=False))
    config, state = convert_to_lora(model, rank=4)
    plain = get_peft_model(base(), config).eval()
    set_peft_model_state_dict(plain, state)
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)
    assert (logits(model) - logits(base())).abs().max() > 1e-2
    assert model.base_model.supports_lora_conversion() is True
    assert model.base_model.supports_lora_conversion("routed") is False
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4, adapter_name="routed")
