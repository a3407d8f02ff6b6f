"""Policy attention against the original's values and gradients, and its implementations against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamic.attention import policy_attention, policy_softmax
from dynamic.attention.blockwise import blockwise
from dynamic.attention.function import PolicyAttention
from tests.dynamic.attention.attention_cases import CASES, INPUTS, draw, each_case, relative_errors, run
from tests.golden import load_case

# The golden data's own tolerances. Measured: "eager" equals it bit by bit; "blockwise" differs by up to 1e-6 in the
# output, 3e-6 in gradients of magnitude 5, and 1e-7 of the largest gradient of a policy (2.4e6 in "dominated").
OUTPUT = {"rtol": 1e-4, "atol": 1e-6}
HALF = {"rtol": 1e-2, "atol": 1e-2}
GRADIENT = {"rtol": 1e-3, "atol": 1e-5}

OWN_ROUNDING = 4e-6  # exp(score - log_sum) with scores up to 30; measured 1.1e-6 in "dominated", 5e-7 elsewhere

SOFTMAX = ["softmax_hard", "softmax_soft", "softmax_nocausal_ones", "softmax_dominated", "softmax_bf16"]
SDPA = ["sdpa_causal_hard", "sdpa_causal_soft", "sdpa_dominated", "sdpa_mask_right", "sdpa_mask_left"]
OF_THE_ORIGINAL = 1e-6  # its eps


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_equals_golden(name: str) -> None:
    _, tensors = load_case("dynamic", f"attn_{name}")
    scores, policy = tensors["in/attn"].requires_grad_(), tensors["in/policy"].requires_grad_()
    y = policy_softmax(scores, policy[..., 0])
    (y * tensors["in/g"]).sum().backward()
    half = y.dtype == torch.bfloat16
    torch.testing.assert_close(y, tensors["out/y"], **(HALF if half else OUTPUT))
    torch.testing.assert_close(scores.grad, tensors["grad/attn"], **(HALF if half else GRADIENT))
    torch.testing.assert_close(policy.grad, tensors["grad/policy"], **(HALF if half else GRADIENT))


def golden_results(name: str, implementation: str, eps: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an implementation gives for a golden case, and what it should give."""
    _, tensors = load_case("dynamic", f"attn_{name}")
    inputs = {key: tensors[f"in/{key}"].requires_grad_() for key in INPUTS}
    mask = tensors.get("in/attn_mask")
    y = policy_attention(
        *(inputs[key] for key in INPUTS[:3]),
        inputs["policy"][..., 0],
        causal=mask is None,
        mask=mask,
        implementation=implementation,
        eps=eps,
    )
    (y * tensors["in/g"]).sum().backward()
    found = {"y": y.detach(), **{key: inputs[key].grad for key in INPUTS}}
    return found, {"y": tensors["out/y"], **{key: tensors[f"grad/{key}"] for key in INPUTS}}


@pytest.mark.parametrize("implementation", ["eager", "blockwise"])
@pytest.mark.parametrize("name", SDPA)
def test_attention_equals_golden(name: str, implementation: str) -> None:
    """The original's eps included, also where it dominates."""
    found, expected = golden_results(name, implementation, OF_THE_ORIGINAL)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **(OUTPUT if key == "y" else GRADIENT))


@pytest.mark.parametrize("name", SDPA)
def test_without_eps_golden_is_met_unless_dropped_keys_dominate(name: str) -> None:
    """What eps changes: measured up to 2e-4 of each tensor's norm, and everything in "dominated"."""
    errors = relative_errors(*golden_results(name, "blockwise", 0.0))
    if name == "sdpa_dominated":
        assert min(errors.values()) > 0.1
    else:
        assert max(errors.values()) < 1e-3


@each_case
@pytest.mark.parametrize("eps", [0.0, OF_THE_ORIGINAL, 0.01])
def test_blockwise_is_as_exact_as_eager(name: str, eps: float) -> None:
    """Error against float64 at most twice that of the straightforward float32 formula, plus its own rounding."""
    case = CASES[name]
    tensors, arguments = draw(case)
    exact = run(draw(case, torch.float64)[0], implementation="eager", eps=eps, **arguments)
    allowed = relative_errors(run(tensors, implementation="eager", eps=eps, **arguments), exact)
    errors = relative_errors(run(tensors, implementation="blockwise", eps=eps, **arguments), exact)
    for key, error in errors.items():
        assert error <= 2 * allowed[key] + OWN_ROUNDING, f"{key}: {error:.1e}, eager {allowed[key]:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["hard", "soft", "left_padding", "grouped"])
def test_half_precision_is_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    tensors, arguments = draw(CASES[name], dtype)
    exact_inputs = {key: value.detach().double().requires_grad_() for key, value in tensors.items()}
    exact = run(exact_inputs, implementation="eager", **arguments)
    allowed = relative_errors(run(tensors, implementation="eager", **arguments), exact)
    found = run(tensors, implementation="blockwise", **arguments)
    assert [found[key].dtype for key in ("y", *INPUTS)] == [dtype, *(tensors[key].dtype for key in INPUTS)]
    for key, error in relative_errors(found, exact).items():
        assert error <= 2 * allowed[key], f"{key}: {error:.1e}, eager {allowed[key]:.1e}"


@pytest.mark.parametrize("size", [1, 5, 16, 64])
def test_the_size_of_a_block_does_not_matter(size: int) -> None:
    tensors, arguments = draw(CASES["left_padding"], torch.float64)
    expected = run(tensors, implementation="eager", **arguments)
    masks = (True, arguments["key_mask"], None)
    y = PolicyAttention.apply(*(tensors[key] for key in INPUTS), masks, 8**-0.5, 0.0, blockwise(size))
    torch.testing.assert_close(y, expected["y"])


@pytest.mark.parametrize("eps", [0.0, 0.003])
@pytest.mark.parametrize("name", ["hard", "soft", "one_key_head"])
def test_gradients_equal_finite_differences(name: str, eps: float) -> None:
    """Of a hard policy too: the derivative at 0 is how much a dropped token is missed."""
    case = CASES[name]
    tensors, arguments = draw(case._replace(shape=(2, *case.shape[1:3], 5, 2)), torch.float64)
    if arguments["key_mask"] is not None:
        arguments["key_mask"] = torch.arange(5) >= torch.tensor([[0], [2]])

    def attention(*inputs: Tensor) -> Tensor:
        return policy_attention(*inputs, implementation="blockwise", eps=eps, **arguments)

    assert torch.autograd.gradcheck(attention, tuple(tensors[key] for key in INPUTS))


@pytest.mark.parametrize("implementation", ["eager", "blockwise"])
def test_masks_of_all_forms_say_the_same(implementation: str) -> None:
    tensors, arguments = draw(CASES["left_padding"])
    key_mask = arguments["key_mask"]
    N = key_mask.shape[1]
    visible = torch.ones(N, N, dtype=torch.bool).tril() & key_mask[:, None, None, :]  # (B, 1, N, N)
    additive = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    expected = run(tensors, implementation=implementation, **arguments)
    for mask in (visible, additive, additive.expand(-1, 4, -1, -1)):
        found = run(tensors, implementation=implementation, causal=False, mask=mask)
        assert max(relative_errors(found, expected).values()) < 1e-6
    found = run(tensors, implementation=implementation, causal=True)
    assert relative_errors(found, expected)["y"] > 0.1  # without the mask it is something else


@pytest.mark.parametrize("implementation", ["eager", "blockwise"])
@pytest.mark.parametrize("eps", [0.0, OF_THE_ORIGINAL])
def test_queries_that_see_nothing_give_zeros(implementation: str, eps: float) -> None:
    tensors, arguments = draw(CASES["left_padding"])
    found = run(tensors, implementation=implementation, eps=eps, **arguments)
    blind = ~arguments["key_mask"]
    assert blind.any()
    assert (found["y"].transpose(1, 2)[blind] == 0).all()
    assert (found["q"].transpose(1, 2)[blind] == 0).all()
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("implementation", ["eager", "blockwise"])
def test_kept_tokens_see_what_they_see_after_dropping(implementation: str) -> None:
    """Training with a hard policy and inference on the shortened sequence agree, however large a dropped score is."""
    tensors, _ = draw(CASES["hard"])
    kept = tensors["policy"][0] == 1
    with torch.no_grad():
        tensors["k"][0][:, ~kept] *= 100
    q, k, v, policy = (tensors[key][:1] for key in INPUTS)
    y = policy_attention(q, k, v, policy, causal=True, implementation=implementation)
    shortened = F.scaled_dot_product_attention(*(x[:, :, kept] for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(y[:, :, kept], shortened)
    gradients = torch.autograd.grad(y.sum(), [tensors[key] for key in INPUTS])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("implementation", ["eager", "blockwise"])
def test_with_everything_kept_it_is_ordinary_attention(implementation: str) -> None:
    tensors, _ = draw(CASES["ones"])
    y = policy_attention(*(tensors[key] for key in INPUTS), causal=True, implementation=implementation)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(*(tensors[key] for key in INPUTS[:3]), is_causal=True))


def test_autocast_does_not_reach_inside() -> None:
    tensors, arguments = draw(CASES["hard"])
    expected = run(tensors, implementation="blockwise", **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(tensors, implementation="blockwise", **arguments)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "flash"}, "there are auto, eager, blockwise, triton"),
        ({"eps": -1.0}, "must not be negative"),
        ({"policy": torch.ones(2, 37, 1)}, r"policy has the shape \(2, 37, 1\), the queries ask for \(2, 37\)"),
        ({"key_mask": torch.ones(2, 36)}, r"key_mask has the shape \(2, 36\)"),
        ({"mask": torch.ones(37, 37)}, r"mask has the shape \(37, 37\)"),
        ({"k": torch.ones(2, 4, 40, 8), "v": torch.ones(2, 4, 40, 8)}, "as many keys as queries"),
        ({"k": torch.ones(2, 3, 37, 8), "v": torch.ones(2, 3, 37, 8)}, "divides"),
        ({"v": torch.ones(2, 4, 37, 8, dtype=torch.float64)}, "must share"),
        ({"implementation": "triton"}, "implementation='blockwise'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    tensors, arguments = draw(CASES["hard"])
    with pytest.raises(ValueError, match=message):
        policy_attention(**{**tensors, **arguments, **change})
