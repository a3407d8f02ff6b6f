"""Merging with fixed weights of the experts: what it computes, what it reports, and that it can be undone."""

from __future__ import annotations

import pytest
import torch

from hydralora import HydraLoraConfig
from hydralora.tuner import hydralora_layers
from tests.hydralora.tuner.models import IDS, MASK, adapted, logits, tiny_opt

pytestmark = pytest.mark.versions

INPUTS = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS[:1], "attention_mask": MASK[:1]}]


@pytest.mark.parametrize("weights", ["uniform", "mean-routing"])
def test_merged_model_and_report(weights: str) -> None:
    model = adapted()
    before = logits(model)
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    report = model.merge(weights, INPUTS)
    after = logits(model)
    valid = int(sum(batch["attention_mask"].sum() for batch in INPUTS))
    assert report.tokens == valid
    together = [torch.cat([each, each[: int(MASK[0].sum())]]) for each in (before, after)]
    assert report.relative_error == pytest.approx(float((together[1] - together[0]).norm() / together[0].norm()))
    assert 0 < report.divergence < 1
    assert 0 < report.agreement <= 1
    for name, layer in hydralora_layers(model.base_model.model).items():
        chosen = report.experts[name]
        assert sum(chosen) == pytest.approx(1)
        assert (chosen == [pytest.approx(1 / 3)] * 3) == (weights == "uniform")
        mixed = torch.einsum("e,eor->or", torch.tensor(chosen), layer.expert_matrices("default"))
        delta = 2.0 * mixed @ layer.lora_A["default"].weight
        expected = base[f"base_model.model.{name}.base_layer.weight"] + delta
        torch.testing.assert_close(layer.base_layer.weight, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="merged already"):
        model.merge(weights, INPUTS)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    again = model.merge(weights, INPUTS)
    assert again.relative_error == pytest.approx(report.relative_error, rel=1e-3)
    plain = model.unload()
    torch.testing.assert_close(logits(plain), after, rtol=0, atol=1e-5)


def test_an_approximation_is_no_approximation_without_a_router() -> None:
    """With a router of zeros all weights are 1/E, and both kinds are exact; otherwise neither is."""
    for weights in ("uniform", "mean-routing"):
        routed = adapted().merge(weights, INPUTS)
        model = adapted()
        for layer in hydralora_layers(model).values():
            layer.lora_router["default"].weight.data.zero_()
        even = model.merge(weights, INPUTS)
        assert even.relative_error < 1e-6
        assert routed.relative_error > 1e-3


@pytest.mark.parametrize("weights", ["uniform", "mean-routing"])
@pytest.mark.parametrize("active", ["default", ["default", "b"]], ids=str)
def test_an_adapter_that_is_not_the_only_active_one(weights: str, active: str | list[str]) -> None:
    """What is merged and reported is the named adapter, whichever ones are active, before and after."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_weights": False}
    models = [adapted() for _ in range(2)]
    for model in models:
        torch.manual_seed(1)
        model.add_adapter("b", HydraLoraConfig(lora_nums=2, modules_to_save=["lm_head"], **options))
        model.base_model.model.lm_head.modules_to_save["b"].weight.data.mul_(2)
    alone, named = models
    alone.set_adapter("b")
    named.base_model.set_adapter(active)
    trained = {name for name, weight in named.named_parameters() if weight.requires_grad}
    report = named.merge(weights, INPUTS, adapter_name="b")
    expected = alone.merge(weights, INPUTS)
    assert report == expected
    assert report.relative_error > 1e-4
    assert named.base_model.active_adapters == ([active] if isinstance(active, str) else active)
    assert {name for name, weight in named.named_parameters() if weight.requires_grad} == trained
    for name, layer in hydralora_layers(named.base_model.model).items():
        other = alone.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.base_layer.weight, other.base_layer.weight)


@pytest.mark.parametrize("weights", ["uniform", "mean-routing"])
def test_layers_with_a_flattened_input(weights: str) -> None:
    model = adapted(base=tiny_opt(), target_modules=["fc1", "q_proj"])
    before = logits(model)
    report = model.merge(weights, INPUTS)
    assert report.relative_error > 1e-4
    assert not torch.equal(logits(model), before)
    assert all(sum(chosen) == pytest.approx(1) for chosen in report.experts.values())


def test_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="expected one of"):
        model.merge("best", INPUTS)
    with pytest.raises(ValueError, match="give inputs"):
        model.merge("uniform", [])
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.merge("uniform", INPUTS, adapter_name="other")
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="adapters are disabled"):
        model.merge("uniform", INPUTS)
