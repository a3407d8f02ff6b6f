"""Routing by sequence: who decides, padding, decoding with a cache; and that routing can be observed."""

from __future__ import annotations

import pytest
import torch

from hydralora.layer import expert_balance_loss
from hydralora.model import RoutingRecorder
from hydralora.tuner import hydralora_layers
from hydralora.tuner.batch import BatchNote, prompt_tokens
from tests.hydralora.tuner.models import IDS, MASK, adapted, logits

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
    model.base_model.hydralora_note.prompt = None
    by_token = adapted(routing="token")
    assert not torch.allclose(logits(by_token), logits(model), atol=1e-3)


def test_tokens_of_another_kind_are_refused() -> None:
    model = adapted(routing="sequence")
    layer = next(iter(hydralora_layers(model).values()))
    layer.note = BatchNote(prompt=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"tokens of shape \(2, 4\), but the batch has \(2, 5\)"):
        layer(torch.randn(2, 4, 32))


def test_unloading_removes_the_hook() -> None:
    model = adapted(routing="sequence")
    base = model.get_base_model()
    assert len(base._forward_pre_hooks) == 1
    model.unload()
    assert len(base._forward_pre_hooks) == 0


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
