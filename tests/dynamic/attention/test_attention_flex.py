"""FlexAttention's form of policy attention: its algebra in plain torch, its forward pass, and a run on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dynamic.attention import flex, policy_attention
from tests.dynamic.attention.attention_cases import CASES, INPUTS, draw, each_case, relative_errors, run

OWN_ROUNDING = 2e-6  # largest seen: 4e-7


def matrix(
    q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool
) -> Tensor:
    """FlexAttention by definition, in float32, differentiated by autograd."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    places = [torch.arange(size).view(-1, *[1] * (3 - axis)) for axis, size in enumerate((*q.shape[:3], q.shape[2]))]
    scores = score_mod(q @ k.transpose(-1, -2) * scale, *places)
    if block_mask is not None:
        scores = scores.masked_fill(~block_mask.mask_mod(*places), -torch.inf)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    return (scores.masked_fill(~seen, 0).softmax(-1) * seen) @ v


def by_matrix(tensors: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """As `attention_cases.run`."""
    q, k, v, policy = (tensors[name] for name in INPUTS)
    y = flex.attend(q, k, v, policy, scale=q.shape[-1] ** -0.5, function=matrix, **arguments)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(y)
    gradients = torch.autograd.grad((y * weights).sum(), [tensors[name] for name in INPUTS])
    return {"y": y.detach(), **dict(zip(INPUTS, gradients, strict=True))}


def references(tensors: dict[str, Tensor], arguments: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The formula in float64, and how far it is from that in the dtype of the tensors."""
    doubles = {key: value.detach().double().requires_grad_() for key, value in tensors.items()}
    exact = run(doubles, implementation="eager", **arguments)
    return exact, relative_errors(run(tensors, implementation="eager", **arguments), exact)


@each_case
def test_its_scores_are_the_formula(name: str) -> None:
    """Outputs and all gradients, those of dropped tokens included."""
    tensors, arguments = draw(CASES[name])
    exact, allowed = references(tensors, arguments)
    for key, error in relative_errors(by_matrix(tensors, arguments), exact).items():
        assert error <= 2 * allowed[key] + OWN_ROUNDING, f"{key}: {error:.1e}, eager {allowed[key]:.1e}"


def test_a_clamp_would_not_train_what_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, arguments = draw(CASES["hard"])
    exact = references(tensors, arguments)[0]["policy"]
    dropped = tensors["policy"] == 0
    found = by_matrix(tensors, arguments)["policy"]
    torch.testing.assert_close(found[dropped].double(), exact[dropped], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(flex, "log_policy", lambda policy: policy.float().clamp(min=flex.SMALLEST_WEIGHT).log())
    assert exact[dropped].abs().max() > 0.01
    assert by_matrix(tensors, arguments)["policy"][dropped].abs().max() == 0


@pytest.mark.parametrize("name", ["hard", "dominated", "bidirectional_padded", "left_padding", "grouped"])
@torch.no_grad()
def test_its_forward_pass_on_the_cpu(name: str) -> None:
    tensors, arguments = draw(CASES[name])
    q, k, v, policy = (tensors[key].detach() for key in INPUTS)
    found = flex.attend(q, k, v, policy, scale=q.shape[-1] ** -0.5, function=flex_attention, **arguments)
    expected = policy_attention(q, k, v, policy, implementation="eager", **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_where_it_cannot_run_it_is_refused() -> None:
    tensors, arguments = draw(CASES["hard"])
    with pytest.raises(ValueError, match=r"FlexAttention: the queries are on the device 'cpu'.*implementation='auto'"):
        run(tensors, implementation="flex", **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_it_on_a_gpu_is_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    tensors, arguments = draw(CASES[name]._replace(shape=(*CASES[name].shape[:3], 300, 64)), dtype)
    exact, allowed = references(tensors, arguments)
    on_gpu = {key: value.detach().cuda().requires_grad_() for key, value in tensors.items()}
    found = run(on_gpu, implementation="flex", **arguments)
    for key, error in relative_errors({key: value.cpu() for key, value in found.items()}, exact).items():
        assert error <= 2 * allowed[key] + OWN_ROUNDING, f"{key}: {error:.1e}, eager {allowed[key]:.1e}"
    with pytest.raises(ValueError, match="eps is 1e-06"):
        run(on_gpu, implementation="flex", eps=1e-6, **arguments)
