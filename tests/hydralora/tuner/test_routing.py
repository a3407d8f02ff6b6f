"""Routing by sequence: who decides, padding, decoding with a cache; and that routing can be observed."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from hydralora import HydraLoraConfig
from hydralora.layer import expert_balance_loss
from hydralora.model import RoutingRecorder
from hydralora.tuner import hydralora_layers
from hydralora.tuner.batch import prompt_tokens
from llava.runtime.cache_name import cache_argument, cache_of
from tests.hydralora.tuner.models import IDS, MASK, TARGETS, adapted, logits, tiny_opt

pytestmark = pytest.mark.versions

LABELS = torch.tensor([[-100, -100, -100, 7, 60, 2], [-100, -100, 44, 12, -100, -100], [1, 22, 70, -100, -100, -100]])


def test_only_tokens_before_the_answer_decide() -> None:
    expected = [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert prompt_tokens(MASK, LABELS).int().tolist() == expected
    assert prompt_tokens(MASK, None).int().tolist() == MASK.tolist()
    assert prompt_tokens(None, None) is None


def test_later_targets_do_not_change_the_routing() -> None:
    """Nothing of the answer reaches a router: the answer's tokens can change and earlier logits stay."""
    model = adapted(routing="sequence")
    other = IDS.clone()
    other[0, 3:] = torch.tensor([11, 12, 13])
    with torch.no_grad():
        first, second = (model(input_ids=ids, attention_mask=MASK, labels=LABELS).logits for ids in (IDS, other))
        looking_ahead = [model(input_ids=ids, attention_mask=MASK).logits for ids in (IDS, other)]
    torch.testing.assert_close(first[0, :3], second[0, :3], rtol=0, atol=1e-6)
    assert not torch.allclose(looking_ahead[0][0, :3], looking_ahead[1][0, :3], atol=1e-5), "the negative control"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(side: str) -> None:
    model = adapted(routing="sequence")
    alone = logits(model, IDS[2:, :3], MASK[2:, :3])
    pad = (3, 0) if side == "left" else (0, 3)
    ids, mask = (torch.nn.functional.pad(each[2:, :3], pad) for each in (IDS, MASK))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(logits(model, ids, mask, position_ids=positions), alone, rtol=0, atol=1e-5)


def test_generated_tokens_keep_the_weights_of_their_prompt() -> None:
    """Decoding with a cache equals one pass in which the prompt alone decides."""
    model = adapted(routing="sequence")
    prompt = IDS[:1]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    whole = out.sequences
    labels = torch.cat([torch.full_like(prompt, -100), whole[:, prompt.shape[1] :]], dim=1)
    with torch.no_grad():
        expected = model(input_ids=whole, attention_mask=torch.ones_like(whole), labels=labels).logits
    steps = torch.stack(out.logits, dim=1)
    torch.testing.assert_close(steps, expected[:, prompt.shape[1] - 1 : -1], rtol=0, atol=1e-5)
    by_token = adapted(routing="token")
    assert not torch.allclose(logits(by_token), logits(model), atol=1e-3)


@pytest.mark.parametrize("base", ["llama", "opt"])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_generating_without_a_cache(base: str, task_type: str | None) -> None:
    """Generated tokens decide nothing, whether there is a cache or not; with padding and several beams too."""
    options = {"base": tiny_opt(), "target_modules": ["fc1", "v_proj"]} if base == "opt" else {}
    model = adapted(routing="sequence", task_type=task_type, **options)
    prompts = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}  # padded on the left
    limits = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    limits |= {"output_scores": True, "return_dict_in_generate": True}
    with_cache, without = (model.generate(**prompts, **limits, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.scores, without.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def continued(model: PeftModel, cache: object) -> torch.Tensor:
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([[33]]), **cache_argument(model.get_base_model().forward, copy.deepcopy(cache))
        ).logits


def test_every_cache_keeps_the_weights_of_its_own_prompt() -> None:
    """Two prompts under way in turn, one of them run in training mode: each goes on with its own weights."""
    model = adapted(routing="sequence")
    with torch.no_grad():
        first = cache_of(model.train()(input_ids=IDS[:1], use_cache=True))
        expected = continued(model.eval(), first)
        model(input_ids=torch.tensor([[70, 71, 72]]), use_cache=True)
    torch.testing.assert_close(continued(model, first), expected, rtol=0, atol=0)


def test_a_prompt_that_the_adapter_has_not_seen_is_refused() -> None:
    model = adapted(routing="sequence")
    other = HydraLoraConfig(r=4, target_modules=TARGETS, routing="sequence", init_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("b", other)
    with torch.no_grad():
        model.set_adapter("b")
        model(input_ids=IDS[1:2])
        model.set_adapter("default")
        cache = cache_of(model(input_ids=IDS[:1], use_cache=True))
    model.set_adapter("b")
    with pytest.raises(ValueError, match="adapter 'b' is to go on from a cache whose prompt it has not routed"):
        continued(model, cache)


def test_layers_with_a_flattened_input() -> None:
    """Rows of a batch are routed one by one where a model flattens them, as OPT does before its MLP."""
    model = adapted(base=tiny_opt(), target_modules=["fc1", "fc2"], routing="sequence")
    with torch.no_grad():
        together = model(input_ids=IDS).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in IDS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    by_token = adapted(base=tiny_opt(), target_modules=["fc1", "fc2"])
    assert not torch.allclose(logits(by_token), logits(model), atol=1e-3)


def test_tokens_of_another_kind_are_refused() -> None:
    model = adapted(routing="sequence")
    mask = torch.ones(2, 5, dtype=torch.bool)
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda layer, args: (args[0][:, :4], *args[1:]))
    with pytest.raises(ValueError, match=r"tokens of shape \(2, 4\), but the batch has \(2, 5\)"):
        model(input_ids=IDS[:2, :5], attention_mask=mask)


def test_unloading_removes_the_hook() -> None:
    model = adapted(routing="sequence")
    base = model.get_base_model()
    assert (len(base._forward_pre_hooks), len(base._forward_hooks)) == (1, 1)
    model.unload()
    assert (len(base._forward_pre_hooks), len(base._forward_hooks)) == (0, 0)


def test_the_routing_can_be_observed() -> None:
    """Recorded probabilities are the layer's own, and a balance loss on them has gradients for the routers alone."""
    model = adapted().train()
    recorder = RoutingRecorder(hydralora_layers(model))
    recorder.start()
    model(input_ids=IDS, attention_mask=MASK)
    recorded = recorder.stop()
    assert len(recorded) == 8
    for routings in recorded.values():
        assert routings[0].probabilities.shape == (3, 6, 3)
    loss = expert_balance_loss([routings[0] for routings in recorded.values()], MASK)
    assert 1 / 3 - 1e-3 < loss.item() < 1
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert all(gradient.any() for name, gradient in gradients.items() if "router" in name)
    assert len([name for name in gradients if "router" in name]) == 8
