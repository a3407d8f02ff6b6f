"""The routed MLP block against the original's values and gradients, and its behaviour beyond them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hydralora.block import RoutedMLP
from hydralora.layer import expert_balance_loss, one_hot_argmax, routed_low_rank, side_by_side, weighted_experts
from hydralora.original import to_original
from tests.golden import load_case
from tests.hydralora.blocks import make_block, original_gradients, set_original_weights

GOLDEN_BLOCKS = ["moe_dense_e3", "moe_sparse_e3", "moe_dense_e2_r6a3"]
# The golden data's own tolerances; measured worst cases: outputs 1.4e-6 at magnitudes up to 9, gradients 7.6e-6 at
# magnitudes up to 53.
OUTPUT = {"rtol": 1e-4, "atol": 1e-5}
GRADIENT = {"rtol": 1e-4, "atol": 1e-5}


def golden_block(name: str) -> tuple[RoutedMLP, dict[str, Tensor]]:
    """The block of a golden case with its weights, and the tensors of the case."""
    case, tensors = load_case("mllm_hydralora", name)
    block = make_block(
        case["hidden"], case["inter"], case["experts"], case["rank"], alpha=case["alpha"], dense=case["dense"]
    )
    set_original_weights(block, tensors)
    return block, tensors


@pytest.mark.parametrize("name", GOLDEN_BLOCKS)
def test_outputs_equal_golden(name: str) -> None:
    block, tensors = golden_block(name)
    routing = block.route(tensors["in/x"])
    torch.testing.assert_close(block(tensors["in/x"]), tensors["out/y"], **OUTPUT)
    torch.testing.assert_close(block.router(tensors["in/x"]), tensors["out/logits"], **OUTPUT)
    torch.testing.assert_close(routing.probabilities, tensors["out/routing"], **OUTPUT)
    torch.testing.assert_close(routing.choice, tensors["out/expert_choice"], **OUTPUT)


@pytest.mark.parametrize("with_routing", [False, True], ids=["output", "output_and_routing"])
@pytest.mark.parametrize("name", GOLDEN_BLOCKS)
def test_gradients_equal_golden(name: str, with_routing: bool) -> None:
    block, tensors = golden_block(name)
    x = tensors["in/x"].clone().requires_grad_()
    objective = (block(x) * tensors["in/cotangent"]).sum()
    if with_routing:
        routing = block.route(x)
        objective = objective + (routing.probabilities * tensors["in/cotangent_routing"]).sum()
        objective = objective + (routing.choice * tensors["in/cotangent_choice"]).sum()
    objective.backward()
    prefix = "grad_r/" if with_routing else "grad/"
    expected = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    ours = original_gradients(block) | {"x": x.grad}
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        if value.numel() == 0:
            assert ours[key] is None, f"{key} should have no gradient"
        else:
            torch.testing.assert_close(ours[key], value, **GRADIENT, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", GOLDEN_BLOCKS)
@pytest.mark.parametrize("changed", ["dense", "alpha", "experts_B_down", "router"])
def test_outputs_differ_when_something_is_changed(name: str, changed: str) -> None:
    """The golden comparison would notice a wrong mode, scale, down projection or router."""
    block, tensors = golden_block(name)
    with torch.no_grad():
        if changed == "dense":
            block.dense = not block.dense
        elif changed == "alpha":
            block.alpha *= 2
        elif changed == "experts_B_down":
            block.experts_B_down.copy_(block.experts_B_down.flip(0))
        else:
            block.router.weight.copy_(block.router.weight.flip(0))
    assert (block(tensors["in/x"]) - tensors["out/y"]).abs().max() > 100 * OUTPUT["atol"]


def naive_low_rank(x: Tensor, shared_a: Tensor, experts_b: Tensor, weights: Tensor) -> Tensor:
    """Textbook loop over experts."""
    return sum(weights[..., e, None] * (x @ shared_a.T @ matrix.T) for e, matrix in enumerate(experts_b))


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("leading", [(), (3,), (2, 4), (2, 3, 2)], ids=str)
def test_stacked_product_equals_loop(experts: int, leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(experts)
    x, a = torch.randn(*leading, 6, generator=generator), torch.randn(4, 6, generator=generator)
    b, w = torch.randn(experts, 7, 4, generator=generator), torch.randn(*leading, experts, generator=generator)
    torch.testing.assert_close(routed_low_rank(x, a, b, w), naive_low_rank(x, a, b, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", ["side by side", "stacked"])
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (3, 1), (0,), (0, 2)], ids=str)
def test_decoding_equals_the_loop(leading: tuple[int, ...], stored: str) -> None:
    """Without gradients a single token takes another way; whatever the experts are stored as, and with a base."""
    generator = torch.Generator().manual_seed(3)
    x, a = torch.randn(*leading, 6, generator=generator), torch.randn(4, 6, generator=generator)
    b, w = torch.randn(5, 7, 4, generator=generator), torch.randn(*leading, 5, generator=generator)
    onto = torch.randn(*leading, 7, generator=generator)
    base = onto.clone()
    with torch.no_grad():
        found = weighted_experts(x @ a.T, b if stored == "stacked" else side_by_side(b), w, 0.5, onto)
    torch.testing.assert_close(found, base + 0.5 * naive_low_rank(x, a, b, w), rtol=1e-5, atol=1e-5)
    assert onto.equal(base), "what is added to stays as it was"
    with torch.no_grad():  # a prepared hot swap keeps the scaling in a tensor
        assert weighted_experts(x @ a.T, b, w, torch.tensor(0.5), onto).allclose(found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("weights_shape", [(2, 4, 3), (2, 1, 3)], ids=["token", "sequence"])
def test_gradients_of_the_stacked_product(weights_shape: tuple[int, ...], dropout: float) -> None:
    """First and second derivatives against finite differences, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5), (2, 5), (3, 6, 2), weights_shape)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def scaled(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same mask every time
        return routed_low_rank(*tensors, scaling=0.7, dropout=dropout)

    torch.manual_seed(1)
    expected = 0.7 * naive_low_rank(F.dropout(inputs[0], dropout), *inputs[1:])
    torch.testing.assert_close(scaled(*inputs), expected)
    assert torch.autograd.gradcheck(scaled, inputs)
    assert torch.autograd.gradgradcheck(scaled, inputs)


def test_gradients_of_the_stacked_product_under_autocast() -> None:
    """Of the parameters' dtype, and as near to float32 as autograd brings the same products."""
    inputs = [torch.randn(2, 40, 32), torch.randn(4, 32), torch.randn(3, 16, 4), torch.rand(2, 40, 3)]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def by_autograd(x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        code = F.linear(F.dropout(x, 0.3), a)
        weighted = (weights.unsqueeze(-1) * code.unsqueeze(-2)).flatten(-2)
        return F.linear(weighted, b.transpose(0, 1).flatten(1))

    def gradients(run: Any, half: bool) -> list[Tensor]:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = run(*inputs)
        assert output.dtype == (torch.bfloat16 if half else torch.float32)
        return list(torch.autograd.grad(output.float().square().mean(), inputs))

    exact, reference = gradients(by_autograd, half=False), gradients(by_autograd, half=True)
    ours = gradients(lambda *tensors: routed_low_rank(*tensors, dropout=0.3), half=True)
    for tensor, gradient, other, correct in zip(inputs, ours, reference, exact, strict=True):
        assert gradient.dtype == tensor.dtype
        assert (gradient - correct).abs().max() <= 2 * (other - correct).abs().max()


@pytest.mark.parametrize("index", range(4), ids=["x", "A", "B", "weights"])
def test_frozen_inputs_of_the_stacked_product_get_no_gradient(index: int) -> None:
    inputs = [torch.randn(2, 4, 5), torch.randn(2, 5), torch.randn(3, 6, 2), torch.randn(2, 4, 3)]
    for number, tensor in enumerate(inputs):
        tensor.requires_grad_(number != index)
    routed_low_rank(*inputs).sum().backward()
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    fused = [tensor.grad for tensor in trained]
    for tensor in trained:
        tensor.grad = None
    naive_low_rank(*inputs).sum().backward()
    assert inputs[index].grad is None
    for gradient, tensor in zip(fused, trained, strict=True):
        torch.testing.assert_close(gradient, tensor.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_the_inputs_the_code_and_a_mask_alone(dtype: torch.dtype, dropout: float) -> None:
    """No stacked copy of B, no (tokens, E * r) and no dropped x stays alive between forward and backward."""
    x, a = torch.randn(2, 40, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype, requires_grad=True)
    b, weights = torch.randn(3, 16, 4, dtype=dtype, requires_grad=True), torch.rand(2, 40, 3, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        routed_low_rank(x, a, b, weights, 2.0, dropout)
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, a, b, weights)}
    others = [(tensor.dtype, tuple(tensor.shape)) for pointer, tensor in kept.items() if pointer not in given]
    assert others == [(torch.bool, (2, 40, 8))] * bool(dropout) + [(dtype, (2, 40, 4))]


def test_sparse_mode_uses_the_most_probable_expert_unscaled() -> None:
    block = make_block(dense=False)
    x = torch.randn(2, 5, 8)
    best = block.route(x).probabilities.argmax(-1)

    def project(base: nn.Linear, a: Tensor, b: Tensor, value: Tensor) -> Tensor:
        update = torch.einsum("blor,blr->blo", b[best], value @ a.T)
        return base(value) + block.alpha / block.rank * update

    gate = project(block.gate_proj, block.shared_A_gate, block.experts_B_gate, x)
    up = project(block.up_proj, block.shared_A_up, block.experts_B_up, x)
    expected = project(block.down_proj, block.shared_A_down, block.experts_B_down, F.silu(gate) * up)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_identity_at_init_and_not_after_perturbation(dense: bool) -> None:
    block = make_block(identity=True, dense=dense, dropout=0.5)
    x = torch.randn(2, 5, 8)
    base = block.down_proj(F.silu(block.gate_proj(x)) * block.up_proj(x))
    torch.testing.assert_close(block(x), base, rtol=0, atol=0)
    block.reset_parameters(identity=False)
    assert (block(x) - base).abs().max() > 1e-3


def test_initial_values_have_the_documented_range() -> None:
    block = make_block(width=64, inner=128, rank=16, identity=True)
    for matrix, fan_in in ((block.shared_A_gate, 64), (block.shared_A_up, 64), (block.shared_A_down, 128)):
        assert matrix.abs().max() <= fan_in**-0.5
        assert matrix.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
    assert not any(b.any() for b in (block.experts_B_gate, block.experts_B_up, block.experts_B_down))


def test_state_dict_keys_of_the_base_do_not_change() -> None:
    block = make_block()
    base = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    added = {f"{kind}_{part}" for kind in ("shared_A", "experts_B") for part in ("gate", "up", "down")}
    added |= {"router.weight", "router.bias"}
    assert set(block.state_dict()) == base | added
    assert {name for name, _ in block.added_parameters()} == added


def test_one_expert_is_plain_lora() -> None:
    block = make_block(experts=1)
    x = torch.randn(2, 5, 8)
    assert (block.route(x).probabilities == 1).all()
    scale = block.alpha / block.rank
    gate, up, down = (
        nn.Linear(layer.in_features, layer.out_features, bias=False)
        for layer in (block.gate_proj, block.up_proj, block.down_proj)
    )
    with torch.no_grad():
        gate.weight.copy_(block.gate_proj.weight + scale * block.experts_B_gate[0] @ block.shared_A_gate)
        up.weight.copy_(block.up_proj.weight + scale * block.experts_B_up[0] @ block.shared_A_up)
        down.weight.copy_(block.down_proj.weight + scale * block.experts_B_down[0] @ block.shared_A_down)
    torch.testing.assert_close(block(x), down(F.silu(gate(x)) * up(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("added_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_bfloat16_base(dense: bool, added_dtype: torch.dtype) -> None:
    """Output in the base's dtype; error against fp32 within twice that of the base MLP alone in bf16."""
    block = make_block(width=64, inner=96, dense=dense)
    x = torch.randn(2, 5, 64)
    exact, probabilities = block(x), block.route(x).probabilities
    base_exact = block.down_proj(F.silu(block.gate_proj(x)) * block.up_proj(x))
    for layer in (block.gate_proj, block.up_proj, block.down_proj):
        layer.to(torch.bfloat16)
    for parameter in dict(block.added_parameters()).values():
        parameter.data = parameter.data.to(added_dtype)
    half = x.bfloat16()
    output = block(half)
    assert output.dtype == torch.bfloat16
    assert block.route(half).probabilities.dtype == torch.float32
    same = one_hot_argmax(block.route(half).probabilities).equal(one_hot_argmax(probabilities))
    assert same, "the draw should have no ties within bf16"
    base_half = block.down_proj(F.silu(block.gate_proj(half)) * block.up_proj(half))
    base_error = (base_half - base_exact).abs().max() / base_exact.abs().max()
    assert (output - exact).abs().max() / exact.abs().max() <= 2 * base_error
    output.sum().backward()
    assert block.experts_B_gate.grad is not None
    assert block.experts_B_gate.grad.dtype == added_dtype


def test_autocast() -> None:
    block = make_block(width=64, inner=96)
    x = torch.randn(2, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), block(x), rtol=0.05, atol=0.02)


def test_meta_device() -> None:
    """Built on meta, then filled from a state dict, it computes what the original computes."""
    reference = make_block()
    with torch.device("meta"):
        block = make_block()
    assert all(parameter.is_meta for parameter in block.parameters())
    block.load_state_dict(reference.state_dict(), assign=True)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(block(x), reference(x), rtol=0, atol=0)


def test_dropout_draws_one_mask_per_projection_for_all_experts() -> None:
    """With equal experts the routing does not matter, in training with dropout too: all saw the same mask."""
    block = make_block(dropout=0.5).train()
    with torch.no_grad():
        for stacked in (block.experts_B_gate, block.experts_B_up, block.experts_B_down):
            stacked.copy_(stacked[:1].expand_as(stacked))
    x = torch.randn(2, 5, 8)
    torch.manual_seed(0)
    first = block(x)
    with torch.no_grad():
        block.router.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    torch.manual_seed(0)
    torch.testing.assert_close(block(x), first, rtol=1e-5, atol=1e-6)
    torch.manual_seed(1)
    assert (block(x) - first).abs().max() > 1e-3
    block.eval()
    torch.testing.assert_close(block(x), block(x), rtol=0, atol=0)


def gradients(block: RoutedMLP, x: Tensor, run: Any) -> dict[str, Tensor | None]:
    """Gradients of output and balance loss of `run(x)`, with the routing recorded during the forward pass alone."""
    block.zero_grad()
    recorded: list[Any] = []
    block.observers = [recorded.append]
    output = run(x)
    block.observers = []
    loss = output.square().mean() + 0.5 * expert_balance_loss(recorded, None)
    loss.backward()
    return {name: parameter.grad for name, parameter in block.added_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_checkpointing_gives_the_same_gradients(dense: bool, dropout: float) -> None:
    block = make_block(dense=dense, dropout=dropout).train()
    x = torch.randn(2, 5, 8, requires_grad=True)
    torch.manual_seed(3)
    plain = gradients(block, x, block)
    torch.manual_seed(3)
    checkpointed = gradients(block, x, lambda value: checkpoint(block, value, use_reentrant=False))
    assert plain["router.weight"] is not None
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-8)


def test_reentrant_checkpointing_cuts_the_balance_loss_off() -> None:
    """The reason why the extension refuses it: this test fails if torch ever mends that."""
    block = make_block(dense=False)
    x = torch.randn(2, 5, 8, requires_grad=True)
    gradient = gradients(block, x, lambda value: checkpoint(block, value, use_reentrant=True))
    assert gradient["router.weight"] is None


def test_conversion_lists_every_added_parameter() -> None:
    block = make_block()
    names = to_original((f"mlp.{name}", parameter) for name, parameter in block.added_parameters())
    assert len(names) == 3 + 3 * block.experts + 2
