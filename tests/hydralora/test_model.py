"""Attaching the blocks to a decoder, and observing their routing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hydralora.config import RoutedMLPConfig
from hydralora.layer import Routing, expert_balance_loss
from hydralora.model import RoutingRecorder, added_parameters, attach, record_routing, routed_blocks
from hydralora.statistics import RoutingStatistics, TaskStatistics

CONFIG = RoutedMLPConfig(experts=3, rank=2, alpha=4, dropout=0.0)


def make_decoder() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def perturb(model: nn.Module) -> None:
    for block in routed_blocks(model).values():
        block.reset_parameters(identity=False)


IDS = torch.arange(1, 11).reshape(2, 5)


class TestAttach:
    def test_starts_as_the_base_and_then_differs(self) -> None:
        model = make_decoder()
        base = model(IDS).logits
        attach(model, CONFIG)
        torch.testing.assert_close(model(IDS).logits, base, rtol=0, atol=0)
        perturb(model)
        assert (model(IDS).logits - base).abs().max() > 1e-3

    def test_wraps_the_very_projections_and_keeps_their_keys(self) -> None:
        model = make_decoder()
        projections = [layer.mlp.gate_proj for layer in model.model.layers]
        keys = set(model.state_dict())
        blocks = attach(model, CONFIG)
        assert list(blocks) == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert [block.gate_proj for block in blocks.values()] == projections
        assert set(model.state_dict()) - {name for name, _ in added_parameters(model)} == keys

    def test_freezes_the_wrapped_projections_alone(self) -> None:
        model = make_decoder()
        blocks = attach(model, CONFIG)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert frozen == {f"{name}.{part}_proj.weight" for name in blocks for part in ("gate", "up", "down")}
        assert all(parameter.requires_grad for _, parameter in added_parameters(model))

    def test_settings_arrive(self) -> None:
        model = make_decoder().to(torch.bfloat16).train()
        config = RoutedMLPConfig(experts=4, rank=3, alpha=6, dropout=0.25, dense=False)
        for block in attach(model, config).values():
            assert (block.experts, block.rank, block.alpha, block.dropout, block.dense) == (4, 3, 6, 0.25, False)
            assert block.experts_B_down.shape == (4, 16, 3)
            assert {parameter.dtype for _, parameter in block.added_parameters()} == {torch.float32}
            assert block.training
        assert model(IDS).logits.dtype == torch.bfloat16

    def test_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            model = make_decoder()
        attach(model, CONFIG)
        assert all(parameter.is_meta for _, parameter in added_parameters(model))

    def test_twice_is_refused(self) -> None:
        model = make_decoder()
        attach(model, CONFIG)
        with pytest.raises(ValueError, match="decoder layer 0 has a routed MLP block already"):
            attach(model, CONFIG)

    @pytest.mark.parametrize(("kind", "count"), [("plain", 0), ("twin", 2)])
    def test_a_layer_without_one_gated_mlp_is_refused_untouched(self, kind: str, count: int) -> None:
        model = make_decoder()
        last = model.model.layers[1]
        if kind == "plain":
            last.mlp = nn.Linear(16, 16)
        else:
            last.other = make_decoder().model.layers[0].mlp
        with pytest.raises(ValueError, match=rf"decoder layer 1 \(LlamaDecoderLayer\) holds {count} gated MLPs"):
            attach(model, CONFIG)
        assert not routed_blocks(model)


class TestRecording:
    def test_records_every_pass_of_generation(self) -> None:
        model = make_decoder()
        attach(model, CONFIG)
        perturb(model)
        with record_routing(model) as routing:
            model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
        assert list(routing) == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert [tuple(p.shape) for p in routing["model.layers.0.mlp"]] == [(2, 5, 3), (2, 1, 3), (2, 1, 3)]
        for probabilities in routing["model.layers.1.mlp"]:
            assert not probabilities.requires_grad
            torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:2]))

    def test_leaves_no_observer_after_an_error(self) -> None:
        model = make_decoder()
        attach(model, CONFIG)
        with pytest.raises(RuntimeError, match="inside"), record_routing(model):
            raise RuntimeError("inside")
        assert not any(block.observers for block in routed_blocks(model).values())

    def test_two_recorders_do_not_disturb_each_other(self) -> None:
        model = make_decoder()
        attach(model, CONFIG)
        outer = RoutingRecorder(routed_blocks(model))
        outer.start()
        with record_routing(model) as inner:
            model(IDS)
        model(IDS)
        assert [len(passes) for passes in inner.values()] == [1, 1]
        assert [len(passes) for passes in outer.stop().values()] == [2, 2]

    def test_starting_again_drops_what_an_error_left(self) -> None:
        model = make_decoder()
        attach(model, CONFIG)
        recorder = RoutingRecorder(routed_blocks(model))
        recorder.start()
        model(IDS)
        recorder.start()
        assert [passes for passes in recorder.stop().values()] == [[], []]
        assert recorder.stop() == {}


def routing_of(choices: list[list[int]], experts: int, sharpness: float = 2.0) -> Routing:
    """Routing (B, L, E) whose most probable experts are `choices`."""
    hot = nn.functional.one_hot(torch.tensor(choices), experts).float()
    probabilities = torch.softmax(sharpness * hot, dim=-1).requires_grad_()
    return Routing(probabilities, hot)


def balance_by_loops(routings: list[Routing], mask: Tensor) -> float:
    """The definition, token by token."""
    terms = []
    for sample, row in enumerate(mask.tolist()):
        tokens = [(r, t) for r in routings for t, valid in enumerate(row) if valid]
        experts = routings[0].choice.shape[-1]
        f = [sum(r.choice[sample, t, e].item() for r, t in tokens) / len(tokens) for e in range(experts)]
        p = [sum(r.probabilities[sample, t, e].item() for r, t in tokens) / len(tokens) for e in range(experts)]
        terms.append(sum(a * b for a, b in zip(f, p, strict=True)))
    return sum(terms) / len(terms)


class TestBalanceLoss:
    MASK = torch.tensor([[True, True, True, False], [False, True, True, False]])
    ROUTINGS = (routing_of([[0, 1, 2, 0], [1, 1, 1, 0]], 3), routing_of([[0, 0, 2, 2], [2, 1, 0, 0]], 3))

    def test_equals_the_definition(self) -> None:
        loss = expert_balance_loss(self.ROUTINGS, self.MASK)
        assert loss.item() == pytest.approx(balance_by_loops(list(self.ROUTINGS), self.MASK), rel=1e-6)
        without = expert_balance_loss(self.ROUTINGS, None)
        assert without.item() == pytest.approx(balance_by_loops(list(self.ROUTINGS), torch.ones(2, 4)), rel=1e-6)
        assert abs((loss - without).item()) > 1e-3

    def test_range(self) -> None:
        balanced = routing_of([[0, 1, 2]], 3, sharpness=1e-3)
        collapsed = routing_of([[1, 1, 1]], 3, sharpness=50.0)
        assert expert_balance_loss([balanced], None).item() == pytest.approx(1 / 3, rel=1e-4)
        assert expert_balance_loss([collapsed], None).item() == pytest.approx(1.0, rel=1e-4)

    def test_gradient_reaches_the_probabilities_of_valid_tokens_alone(self) -> None:
        routing = routing_of([[0, 1, 2, 0], [1, 1, 1, 0]], 3)
        expert_balance_loss([routing], self.MASK).backward()
        assert (routing.probabilities.grad.abs().sum(-1) > 0).equal(self.MASK)

    def test_a_sample_without_valid_tokens_contributes_nothing(self) -> None:
        routing = routing_of([[0, 1], [1, 1]], 3)
        mask = torch.tensor([[True, True], [False, False]])
        alone = expert_balance_loss([Routing(routing.probabilities[:1], routing.choice[:1])], None)
        torch.testing.assert_close(expert_balance_loss([routing], mask), alone / 2)

    def test_shapes_that_differ_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"mask \(2, 4\) and routing \(1, 2\)"):
            expert_balance_loss([routing_of([[0, 1]], 3)], self.MASK)


class TestStatistics:
    def test_shares_and_entropy_over_valid_tokens(self) -> None:
        statistics = RoutingStatistics()
        assert statistics.pop() == {}
        mask = torch.tensor([[True, True, False, False]])
        statistics.add([routing_of([[0, 1, 2, 2]], 3, sharpness=0.0)], mask)
        statistics.add([routing_of([[0, 0, 2, 2]], 3, sharpness=100.0)], mask)
        values = statistics.pop()
        shares = [values[f"share_{expert}"] for expert in range(3)]
        assert shares == pytest.approx([0.75, 0.25, 0.0])
        assert values["entropy"] == pytest.approx(math.log(3) / 2, rel=1e-5)
        assert statistics.pop() == {}

    def test_layers_with_different_numbers_of_experts_are_counted_apart(self) -> None:
        statistics = RoutingStatistics()
        routings = [routing_of([[0, 1, 1, 1]], 2), routing_of([[0, 0, 4, 4]], 5), routing_of([[0, 0, 0, 0]], 1)]
        statistics.add(routings, None)
        values = statistics.pop()
        assert [values[f"share_{expert}_of_2"] for expert in range(2)] == pytest.approx([0.25, 0.75])
        assert [values[f"share_{expert}_of_5"] for expert in range(5)] == pytest.approx([0.5, 0, 0, 0, 0.5])
        assert len(values) == 9
        statistics.add(routings[-1:], None)
        assert statistics.pop() == {"share_0": 1.0, "entropy": 0.0}

    @pytest.mark.parametrize("pending", [0, 1 << 22], ids=["at once", "together"])
    def test_by_task_when_counted_at_once_or_together(self, pending: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two layers and three passes; what the caller does not say to be an expert's is its most probable one's."""
        monkeypatch.setattr("hydralora.statistics.PENDING", pending)
        statistics = TaskStatistics()
        sharp = torch.tensor([[[0.7, 0.2, 0.1]] * 2, [[0.1, 0.2, 0.7]] * 2])  # (2, 2, 3)
        for _ in range(3):
            statistics.add([Routing(sharp), Routing(sharp.flip(0))], torch.tensor([[1, 1], [1, 0]]), ["sums", -1])
        statistics.add([Routing(sharp[:1])], None, ["other"])
        values = statistics.pop()
        entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
        assert [values[f"routing/share_{expert}"] for expert in range(3)] == pytest.approx([0.55, 0.0, 0.45])
        assert values["routing/task_other/share_0"] == 1
        assert [values[f"routing/task_sums/share_{expert}"] for expert in range(3)] == pytest.approx([0.5, 0.0, 0.5])
        assert values["routing/entropy"] == pytest.approx(entropy, rel=1e-5)
        assert values["routing/task_sums/entropy"] == pytest.approx(entropy, rel=1e-5)
        assert len(values) == 12
        assert statistics.pop() == {}
