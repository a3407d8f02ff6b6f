"""Merging with fixed weights of the experts: what it computes, what it reports, and that it can be undone."""

from __future__ import annotations

import pytest
import torch

from hydralora.tuner import hydralora_layers
from tests.hydralora.tuner.models import IDS, MASK, adapted, logits

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
        mixed = torch.einsum("e,eor->or", torch.tensor(chosen), layer.hydralora_B["default"])
        delta = 2.0 * mixed @ layer.hydralora_A["default"]
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
            layer.hydralora_router["default"].data.zero_()
        even = model.merge(weights, INPUTS)
        assert even.relative_error < 1e-6
        assert routed.relative_error > 1e-3


def test_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="expected one of"):
        model.merge("best", INPUTS)
    with pytest.raises(ValueError, match="give inputs"):
        model.merge("uniform", [])
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.merge("uniform", INPUTS, adapter_name="other")
