"""Routed blocks in bases whose gated MLP does more than Llama's: each against the base and a reference by hooks."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from hydralora import RoutedMLP, RoutedMLPConfig, added_parameters, attach, patch_llava, record_routing, routed_blocks
from hydralora.block import KINDS, release
from hydralora.gated import is_gated_mlp
from hydralora.layer import expert_balance_loss
from hydralora.model import RoutingRecorder, decoder_layers
from tests.checkpointed import checkpoint_layers
from tests.hydralora.bases import BASES, IDS, REFUSED, built, run, tiny

pytestmark = pytest.mark.versions
CONFIG = RoutedMLPConfig(experts=3, rank=2, alpha=4, dropout=0.0)
each_base = pytest.mark.parametrize("kind", BASES)


def adapted(kind: str, config: RoutedMLPConfig = CONFIG) -> Any:
    """A model with blocks whose experts act."""
    model = tiny(kind)
    attach(model, config)
    perturb(model)
    return model


def perturb(model: nn.Module) -> None:
    torch.manual_seed(3)
    for block in routed_blocks(model).values():
        block.reset_parameters(identity=False)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(added_parameters(model))


def gradients(model: nn.Module, parameters: dict[str, Any]) -> dict[str, Tensor]:
    """Of the sum of the squared logits, by name of the parameter."""
    found = torch.autograd.grad(run(model).logits.float().square().sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def checkpoints_itself(kind: str) -> bool:
    """Whether an untouched base has the same gradients with its layers computed again and without."""
    model = tiny(kind).train()
    weights = {"embeddings": model.get_input_embeddings().weight}
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(gradients(model, weights)["embeddings"])
        checkpoint_layers(model)
    return bool(torch.allclose(*found, rtol=1e-3, atol=1e-3 * float(found[0].abs().max())))


@contextmanager
def experts_by_hooks(base: Any, blocks: dict[str, Any], weights: dict[str, Tensor]) -> Iterator[None]:
    """Let an untouched base compute with experts: hooks on its linear layers, one product per expert.

    Args:
        base: the model without blocks.
        blocks: settings of the blocks by the name of their MLP.
        weights: the added parameters by name.
    """
    handles = []

    def hook_mlp(mlp: nn.Module, name: str) -> None:
        mixed: dict[str, Tensor] = {}

        def route(module: nn.Module, args: tuple[Any, ...]) -> None:
            router = weights[f"{name}.router.weight"], weights[f"{name}.router.bias"]
            mixed["weights"] = F.linear(args[0], *router).softmax(-1)

        def add(kind: str) -> Callable[..., Tensor]:
            shared_a, experts_b = weights[f"{name}.shared_A_{kind}"], weights[f"{name}.experts_B_{kind}"]
            scaling = blocks[name].alpha / blocks[name].rank

            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                for number, expert in enumerate(experts_b):
                    update = F.linear(F.linear(args[0], shared_a), expert)
                    output = output + scaling * mixed["weights"][..., number, None] * update
                return output

            return hook

        handles.append(mlp.register_forward_pre_hook(route))
        for linear, kind in KINDS.items():
            handles.append(mlp.get_submodule(linear).register_forward_hook(add(kind)))

    for name in blocks:
        hook_mlp(base.get_submodule(name), name)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@each_base
class TestEachBase:
    def test_starts_as_the_base_exactly_and_then_every_projection_acts(self, kind: str) -> None:
        model = tiny(kind)
        keys, base = set(model.state_dict()), run(model).logits
        blocks = attach(model, CONFIG)
        assert run(model).logits.equal(base)
        assert set(model.state_dict()) - trained(model).keys() == keys
        assert len(blocks) == 2
        for projection in KINDS.values():
            perturb(model)
            with torch.no_grad():
                for block in blocks.values():
                    for other in set(KINDS.values()) - {projection}:
                        getattr(block, f"experts_B_{other}").zero_()
            assert (run(model).logits - base).abs().max() > 1e-4, projection

    def test_values_and_gradients_equal_those_of_hooks_on_the_base(self, kind: str) -> None:
        model, base = adapted(kind), tiny(kind)
        blocks, ours = routed_blocks(model), trained(model)
        theirs = {name: parameter.detach().clone().requires_grad_() for name, parameter in ours.items()}
        logits, before = run(model).logits, run(base).logits
        expected = gradients(model, ours)
        with experts_by_hooks(base, blocks, theirs):
            torch.testing.assert_close(run(base).logits, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
            found = gradients(base, theirs)
        assert (logits - before).abs().max() > 1e-3
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * scale, msg=lambda m, n=name: n + m)

    def test_only_the_projections_are_frozen(self, kind: str) -> None:
        model = tiny(kind)
        before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        blocks = attach(model, CONFIG)
        frozen = before - {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        linears = [f"{name}.{linear}" for name, block in blocks.items() for linear in KINDS]
        assert frozen == {name for name in before if name.rpartition(".")[0] in linears}
        assert len(frozen) >= 3 * len(blocks)
        assert all(parameter.requires_grad for _, parameter in added_parameters(model))

    def test_weights_travel_to_another_model(self, kind: str) -> None:
        model = adapted(kind)
        file = io.BytesIO()
        torch.save({name: parameter.detach() for name, parameter in added_parameters(model)}, file)
        file.seek(0)
        other = tiny(kind)
        attach(other, CONFIG)
        assert not run(other).logits.equal(run(model).logits)
        missing, unexpected = other.load_state_dict(torch.load(file, weights_only=True), strict=False)
        assert not unexpected
        assert not set(missing) & trained(other).keys()
        assert run(other).logits.equal(run(model).logits)

    def test_copies_and_pickles_are_blocks(self, kind: str) -> None:
        model = adapted(kind)
        block = next(iter(routed_blocks(model).values()))
        x = torch.randn(2, 3, 16)
        expected = block(x)
        for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):  # noqa: S301
            assert isinstance(copied, RoutedMLP)
            assert type(copied) is type(block)
            assert copied(x).equal(expected)
            copied.reset_parameters()
            assert not copied(x).equal(expected)
        assert block(x).equal(expected)

    def test_release_gives_the_base_back(self, kind: str) -> None:
        model, base = tiny(kind), tiny(kind)
        classes = [type(module) for module in base.modules()]
        attach(model, CONFIG)
        perturb(model)
        assert [type(module) for module in model.modules()] != classes
        for block in routed_blocks(model).values():
            release(block)
        assert [type(module) for module in model.modules()] == classes
        assert list(model.state_dict()) == list(base.state_dict())
        for ours, theirs in zip(model.modules(), base.modules(), strict=True):
            assert vars(ours).keys() == vars(theirs).keys()
        assert run(model).logits.equal(run(base).logits)

    def test_checkpointing_gives_the_same_gradients(self, kind: str) -> None:
        """In training mode, with dropout of the base and of the experts."""
        if not checkpoints_itself(kind):
            pytest.skip("without blocks the gradients of this base under checkpointing differ from those without")
        model = adapted(kind, RoutedMLPConfig(experts=3, rank=2, alpha=4, dropout=0.25)).train()
        parameters = trained(model)
        torch.manual_seed(1)
        expected = gradients(model, parameters)
        checkpoint_layers(model)
        passes = {name: 0 for name in routed_blocks(model)}
        for name, block in routed_blocks(model).items():
            block.observers.append(lambda routing, name=name: passes.update({name: passes[name] + 1}))
        torch.manual_seed(1)
        found = gradients(model, parameters)
        assert min(passes.values()) > 1, "nothing was computed again"
        for name, gradient in expected.items():
            atol = 1e-4 * float(gradient.abs().max())
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: n + m)

    def test_routing_is_recorded_by_rows(self, kind: str) -> None:
        model = adapted(kind)
        with record_routing(model) as routing:
            run(model)
        assert list(routing) == list(routed_blocks(model))
        for name, passes in routing.items():
            assert passes, name
            assert {tuple(each.shape) for each in passes} == {(2, 5, 3)}
            torch.testing.assert_close(passes[0].sum(-1), torch.ones(2, 5))

    @pytest.mark.parametrize("dense", [True, False])
    def test_the_compiler_sees_one_graph(self, kind: str, dense: bool) -> None:
        model = adapted(kind, RoutedMLPConfig(experts=3, rank=2, alpha=4, dropout=0.0, dense=dense))
        block = next(iter(routed_blocks(model).values()))
        x = torch.randn(2, 5, 16)
        expected = block(x)
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
        exported = torch.export.export(block, (x,), strict=False).module()(x)
        torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "a sparse gate", "a shared expert"])
def test_calls_of_several_threads_do_not_meet(kind: str) -> None:
    """Two inputs through one block at once, entered alternately: each gives what it gives alone."""
    model = adapted(kind)
    block = next(iter(routed_blocks(model).values()))
    inputs = [torch.randn(2, 3, 16) for _ in range(2)]
    alone = [block(x) for x in inputs]
    barrier = threading.Barrier(2, timeout=60)

    def wait(module: nn.Module, args: Any) -> None:
        barrier.wait()

    block.up_proj.register_forward_pre_hook(wait)
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: block(inputs[n])})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number].equal(alone[number]) for number in range(2)] == [True, True]


def test_a_call_leaves_nothing_on_the_block() -> None:
    """Nor do an error in the middle and a recorded pass."""
    model = adapted("a norm before the last projection")
    block = next(iter(routed_blocks(model).values()))
    before = {name: (id(value), repr(value)) for name, value in vars(block).items()}
    block(torch.randn(2, 3, 16))
    handle = block.down_proj.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        block(torch.randn(2, 3, 16))
    handle.remove()
    assert {name: (id(value), repr(value)) for name, value in vars(block).items()} == before


def test_a_placed_model_is_adapted() -> None:
    """Programs of accelerate keep the bound `forward` of every module in the object."""
    model, plain = tiny("a norm before the last projection"), adapted("a norm before the last projection")
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(decoder_layers(model)[0].mlp)
    attach(model, CONFIG)
    perturb(model)
    assert run(model).logits.equal(run(plain).logits)
    for block in routed_blocks(model).values():
        release(block)
    assert run(model).logits.equal(run(tiny("a norm before the last projection")).logits)


@pytest.mark.parametrize("kind", ["a norm before the last projection", "a shared expert"])
def test_the_balance_loss_of_a_patched_base(kind: str) -> None:
    """Tokens that a layer has flattened are those of their rows: padding counts for nothing."""
    model = tiny(kind)
    base = tiny(kind)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS}
    patch = patch_llava(model, RoutedMLPConfig(experts=3, rank=2, alpha=4, dropout=0.0, balance_weight=0.5))
    loss = model(**batch).loss
    recorder = RoutingRecorder(patch.blocks)
    recorder.start()
    model.get_decoder()(input_ids=IDS, attention_mask=mask)
    routings = [passes[-1] for passes in recorder.stop().values()]
    rows = [type(r)(r.probabilities.reshape(2, 5, 3), r.choice.reshape(2, 5, 3)) for r in routings]
    expected = 0.5 * expert_balance_loss(rows, mask)
    assert patch.balance_loss.item() == pytest.approx(expected.item(), abs=1e-7)
    assert loss.item() == pytest.approx(base(**batch).loss.item() + expected.item(), abs=1e-6)
    loss.backward()
    assert all(block.router.weight.grad.abs().max() > 0 for block in patch.blocks.values())
    patch.revert()
    assert model(**batch).loss.item() == base(**batch).loss.item()


class TestChoice:
    def test_among_listed_experts_the_shared_one(self) -> None:
        """Experts as modules of a list, as transformers 4 and others keep them."""
        model = tiny("a shared expert")
        for layer in decoder_layers(model):
            layer.mlp.others = nn.ModuleList(copy.deepcopy(layer.mlp.shared_expert) for _ in range(4))
            assert sum(is_gated_mlp(module) for module in layer.modules()) == 5
        assert list(attach(model, CONFIG)) == ["model.layers.0.mlp.shared_expert", "model.layers.1.mlp.shared_expert"]

    def test_a_dense_layer_among_sparse_ones(self) -> None:
        names = list(attach(tiny("a dense layer, then a shared expert"), CONFIG))
        assert names == ["model.layers.0.mlp", "model.layers.1.mlp.shared_experts"]

    @pytest.mark.parametrize(("second", "choice"), [("listed", "0 of them"), ("twin", "2 of them")])
    def test_no_clear_choice_is_refused(self, second: str, choice: str) -> None:
        model = tiny("a shared expert")
        layer = decoder_layers(model)[1]
        if second == "listed":
            layer.mlp.listed = nn.ModuleList([layer.mlp.shared_expert, copy.deepcopy(layer.mlp.shared_expert)])
            del layer.mlp.shared_expert
        else:
            layer.mlp.twin = copy.deepcopy(layer.mlp.shared_expert)
        with pytest.raises(ValueError, match=rf"decoder layer 1 \(.*\) holds 2 gated MLPs, {choice} outside lists"):
            attach(model, CONFIG)
        assert not routed_blocks(model)

    def test_an_mlp_that_layers_share_is_one_block(self) -> None:
        model = tiny("llama")
        layers = decoder_layers(model)
        layers[1].mlp = layers[0].mlp
        base = run(model).logits
        assert list(attach(model, CONFIG)) == ["model.layers.0.mlp"]
        assert run(model).logits.equal(base)
        perturb(model)
        assert not run(model).logits.equal(base)


class ReadsWeights(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(F.linear(x, self.gate_proj.weight)) * self.up_proj(x))


class LeavesOut(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)))


class CallsBehind(LlamaMLP):
    """Reaches its linear layers where no argument of the call can."""

    def forward(self, x: Tensor) -> Tensor:
        down, gate, up = (self._modules[name] for name in ("down_proj", "gate_proj", "up_proj"))
        return down(self.act_fn(gate(x)) * up(x))


class TakesMore(LlamaMLP):
    def forward(self, x: Tensor, step: int) -> Tensor:
        return super().forward(x) * step


class ReturnsMore(LlamaMLP):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Counts(LlamaMLP):
    """Never the same twice."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counts.calls += 1
        return super().forward(x) * Counts.calls


class HasRouter(LlamaMLP):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.router = nn.Linear(16, 2)


WRONG: dict[type[LlamaMLP], str] = {
    ReadsWeights: "ReadsWeights cannot run with adapted linear layers .*'weight'",
    LeavesOut: "LeavesOut does not call up_proj, whose experts would not act",
    CallsBehind: "CallsBehind does not call gate_proj, up_proj, down_proj",
    TakesMore: "TakesMore cannot be run on hidden states alone: .*'step'",
    ReturnsMore: r"ReturnsMore returns tuple for hidden states \(2, 3, 16\)",
    Counts: "Counts with adapted linear layers, all experts zero, differs from Counts by",
    HasRouter: r"a HasRouter has \['router'\] of its own",
}


def llama_with(mlp: type[LlamaMLP]) -> Any:
    """A Llama whose last layer has another MLP."""
    model = tiny("llama")
    layer = decoder_layers(model)[1]
    layer.mlp = mlp(model.config)
    return model


class TestComparison:
    @pytest.mark.parametrize("mlp", WRONG, ids=lambda mlp: mlp.__name__)
    def test_an_mlp_that_does_something_else_is_refused_untouched(self, mlp: type[LlamaMLP]) -> None:
        model = llama_with(mlp).train()
        decoder_layers(model)[0].mlp.up_proj.requires_grad_(False)
        before = [(type(module), module.training, vars(module).keys()) for module in model.modules()]
        state, required = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=rf"decoder layer 1 \(LlamaDecoderLayer\): {WRONG[mlp]}"):
            attach(model, CONFIG)
        assert not routed_blocks(model)
        assert [(type(module), module.training, vars(module).keys()) for module in model.modules()] == before
        assert (list(model.state_dict()), [p.requires_grad for p in model.parameters()]) == (state, required)

    def test_a_forward_that_was_replaced_in_the_object_is_refused(self) -> None:
        model = tiny("llama")
        mlp = decoder_layers(model)[0].mlp
        mlp.forward = lambda x: x
        with pytest.raises(ValueError, match=r"'forward' of this LlamaMLP was replaced in the object"):
            attach(model, CONFIG)
        assert not routed_blocks(model)

    def test_memory_that_no_weights_were_read_into_may_hold_anything(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Programs that read weights afterwards, as upstream's do, switch the drawing of linear layers off."""
        monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: nn.init.constant_(self.weight, torch.nan))
        monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, **_: tensor.data.fill_(torch.inf))
        block = next(iter(attach(tiny("llama"), CONFIG).values()))
        assert block.router.weight.isnan().all(), "what was there is there again"
        assert block.shared_A_gate.isinf().all()

    def test_methods_and_super_reach_the_adapted_layers(self) -> None:
        class Steps(LlamaMLP):
            def inner(self, x: Tensor) -> Tensor:
                return self.act_fn(self.gate_proj(x)) * self.up

            @property
            def up(self) -> Tensor:
                return self.up_proj(self.last)

            def forward(self, x: Tensor) -> Tensor:
                self.last = x
                return self.down_proj(self.inner(x))

        class Halved(Steps):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 0.5

        model, twice = llama_with(Halved), llama_with(Halved)
        twice.load_state_dict(model.state_dict())
        attach(model, CONFIG)
        perturb(model)
        with experts_by_hooks(twice, routed_blocks(model), trained(model)):
            torch.testing.assert_close(run(twice).logits, run(model).logits, rtol=1e-4, atol=1e-5)
        assert not run(twice).logits.allclose(run(model).logits)

    def test_nothing_is_run_without_weights(self) -> None:
        """On the meta device an MLP that would be refused is attached; its first call says what is wrong."""
        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(
                    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
                    | {"num_hidden_layers": 1, "num_attention_heads": 2}
                )
            )
            model.model.layers[0].mlp = ReadsWeights(model.config)
        attach(model, CONFIG)
        with pytest.raises(AttributeError, match="weight"):
            model(IDS.to("meta"))

    def test_the_random_state_and_the_modes_stay(self) -> None:
        model = tiny("dropout behind").train()
        decoder_layers(model)[0].mlp.up_proj.eval()
        modes = {name: module.training for name, module in model.named_modules()}
        torch.manual_seed(5)
        attach(model, CONFIG)
        found = torch.rand(1)
        added = {name: parameter.detach().clone() for name, parameter in added_parameters(model)}
        assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
        torch.manual_seed(5)
        for block in routed_blocks(model).values():
            nn.Linear(16, 3)  # the router is drawn once more when it is made
            block.reset_parameters()
        assert torch.rand(1).equal(found)
        assert all(parameter.equal(added[name]) for name, parameter in added_parameters(model))


@pytest.mark.parametrize("kind", REFUSED)
def test_bases_without_a_gated_mlp_are_refused_in_words(kind: str) -> None:
    *recipe, reason = REFUSED[kind]
    model = built(*recipe)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        attach(model, CONFIG)
    assert list(model.state_dict()) == keys
