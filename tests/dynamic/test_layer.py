"""Predictors against the original's values and gradients; decisions, losses and temperature by their definitions."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dynamic.config import kept_count
from dynamic.layer import (
    TextPredictor,
    VisionPredictor,
    gumbel_keep,
    gumbel_noise,
    hard_keep,
    keep_rate_loss,
    reset_predictor,
    temperature,
    top_keep,
    top_keep_mask,
)
from tests.golden import golden_dir, load_case

# The golden data's own tolerances; measured worst cases: logits 1.1e-5 at magnitudes up to 18,
# gradients 4.1e-6 of the largest entry.
LOGITS = {"rtol": 1e-4, "atol": 1e-5}


def golden_predictor(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The predictor of a golden case with its weights, and the tensors of the case."""
    case, tensors = load_case("dynamic", name)
    hp = case["hp"]
    predictor: nn.Module
    if hp["type"] == "vision":
        predictor = VisionPredictor(
            hp["input_dim"], hp["d_model"], hp["nhead"], hp["dim_feedforward"], hp["num_layers"]
        )
    else:
        predictor = TextPredictor(hp["input_dim"], hp["d_model"])
    stored = tensors
    if case.get("weights_file"):
        stored = load_file(golden_dir("dynamic") / case["weights_file"])
    prefix = "w/" + hp.get("weights_prefix", "")
    weights = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    predictor.load_state_dict(weights)  # strict: the names are the original's
    return predictor, tensors


@pytest.mark.parametrize("name", ["predictor_vision_allones", "predictor_vision_partial", "predictor_text"])
def test_predictors_equal_golden(name: str) -> None:
    predictor, tensors = golden_predictor(name)
    inputs = {
        key: tensors[f"in/{key}"].clone().requires_grad_() for key in ("x", "image_policy") if f"in/{key}" in tensors
    }
    logits = predictor(*inputs.values())
    torch.testing.assert_close(logits, tensors["out/logits"], **LOGITS)
    torch.testing.assert_close(logits.log_softmax(-1), tensors["out/log_softmax"], **LOGITS)
    (logits * tensors["in/g"]).sum().backward()
    ours = {key: value.grad for key, value in inputs.items()}
    ours |= {f"w/{key}": value.grad for key, value in predictor.named_parameters()}
    expected = {key.removeprefix("grad/"): value for key, value in tensors.items() if key.startswith("grad/")}
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        atol = 1e-4 * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def test_without_mask_is_a_mask_of_ones() -> None:
    predictor, tensors = golden_predictor("predictor_vision_allones")
    x = tensors["in/x"]
    torch.testing.assert_close(predictor(x), predictor(x, torch.ones_like(x[..., :1])), rtol=1e-6, atol=1e-6)
    half = torch.ones_like(x[..., :1])
    half[:, ::2] = 0
    assert not torch.allclose(predictor(x), predictor(x, half), atol=1e-3)


def test_a_shorter_image_in_the_batch_is_judged_as_alone() -> None:
    predictor, tensors = golden_predictor("predictor_vision_allones")
    x = tensors["in/x"]
    padded = x.clone()
    padded[1, 10:] = 7.0
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[1, 10:] = False
    together = predictor(padded, valid=valid)
    torch.testing.assert_close(together[:1], predictor(x[:1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1:, :10], predictor(x[1:, :10]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predictor(padded)[1:, :10], together[1:, :10], atol=1e-2)
    nothing = predictor(padded, valid=torch.zeros_like(valid))
    assert bool(nothing.isfinite().all())


def test_fresh_predictors_are_drawn_as_the_originals() -> None:
    torch.manual_seed(0)
    predictor = VisionPredictor(64, 32, 4, 64, 2)
    reset_predictor(predictor)
    for module in predictor.modules():
        if isinstance(module, nn.Linear):
            assert 0.01 < float(module.weight.detach().std()) < 0.03
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()


def test_gumbel_decisions_are_hard_and_follow_the_logits() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).expand(4000, 2, 2)
    kept = gumbel_keep(logits, gumbel_noise(logits.shape), tau=0.5)
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=3e-7)
    # The share of kept tokens is the probability of keeping, whatever the temperature: sigmoid(2) and sigmoid(-2).
    torch.testing.assert_close(kept.mean(0), torch.sigmoid(torch.tensor([2.0, -2.0])), rtol=0, atol=0.03)


def test_gradient_of_a_decision_is_that_of_the_soft_one() -> None:
    logits = torch.randn(3, 5, 2, requires_grad=True)
    noise, tau, g = gumbel_noise(logits.shape), 0.7, torch.randn(3, 5)
    (gradient,) = torch.autograd.grad((gumbel_keep(logits, noise, tau) * g).sum(), logits)
    soft = torch.softmax((logits.log_softmax(-1) + noise) / tau, dim=-1)[..., 0]
    (expected,) = torch.autograd.grad((soft * g).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert bool(gradient.abs().max() > 0)


def test_the_best_are_ranked_by_the_difference_of_the_logits() -> None:
    logits = torch.tensor([[[9.0, 9.0], [1.0, -3.0], [0.0, 5.0], [2.0, 0.0]]])
    assert top_keep(logits, 2).tolist() == [[1, 3]]
    assert hard_keep(logits).tolist() == [[False, True, False, True]]  # a tie is dropped


@pytest.mark.parametrize(
    ("tokens", "rate", "count"), [(576, 0.2, 115), (576, 1.0, 576), (16, 0.5, 8), (3, 0.2, 1), (0, 0.2, 0)]
)
def test_number_of_kept_tokens(tokens: int, rate: float, count: int) -> None:
    assert kept_count(tokens, rate) == count


def test_the_mask_of_the_best_equals_their_indices_row_by_row() -> None:
    torch.manual_seed(1)
    logits, valid = torch.randn(3, 17, 2), torch.ones(3, 17, dtype=torch.bool)
    valid[1, 11:], valid[2, :] = False, False
    mask = top_keep_mask(logits, 0.3, valid)
    for row, tokens in enumerate((17, 11, 0)):
        expected = top_keep(logits[row : row + 1, :tokens], kept_count(tokens, 0.3))[0]
        assert mask[row].nonzero().flatten().tolist() == expected.tolist()
    assert torch.equal(top_keep_mask(logits, 1.0, valid), valid)


def test_weighted_rows_make_a_mean_over_samples() -> None:
    kept = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])  # two images of the first sample, one of the second
    loss = keep_rate_loss(kept, 0.5, row_weights=torch.tensor([0.25, 0.25, 0.5]))
    assert float(loss) == pytest.approx(((0 + 0.25) / 2 + 0.25) / 2)


def test_keep_rate_loss_leaves_short_samples_and_padding_out() -> None:
    kept = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]], requires_grad=True)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    assert float(keep_rate_loss(kept, 0.5)) == pytest.approx((0.25**2 + 0.0) / 2)
    assert float(keep_rate_loss(kept, 0.5, valid)) == pytest.approx((0.25**2 + 0.5**2) / 2)
    loss = keep_rate_loss(kept, 0.5, valid, at_least=3)
    assert float(loss) == pytest.approx(0.25**2 / 2)  # the short sample still counts in the mean
    loss.backward()
    assert bool((kept.grad[0] != 0).all())
    assert not kept.grad[1].any()


def test_an_empty_sample_gives_no_nan() -> None:
    loss = keep_rate_loss(torch.zeros(1, 3, requires_grad=True), 0.5, torch.zeros(1, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss) == 0


def test_temperature_falls_exponentially() -> None:
    values = [temperature(step, 10, 1.0, 0.1) for step in range(11)]
    assert values[0] == 1.0
    assert values[5] == pytest.approx(0.1**0.5)
    assert values[10] == pytest.approx(0.1)
