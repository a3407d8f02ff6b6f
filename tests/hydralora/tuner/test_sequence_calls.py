"""Routing by sequence, however a model is called: each call has a prompt of its own, or is refused in words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Trainer,
    TrainingArguments,
)

from hydralora.tuner import hydralora_layers
from hydralora.tuner.caches import cache_of
from hydralora.tuner.sequence import RoutingBySequenceError
from llava.runtime.cache_name import cache_argument
from tests.checkpointed import checkpoint_layers
from tests.hydralora.tuner.hosts import HOSTS
from tests.hydralora.tuner.models import adapted, tiny_llama

IDS = torch.randint(3, 80, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
LABELS = IDS.clone()
LABELS[:, :3] = -100
BATCH = {"input_ids": IDS, "attention_mask": MASK}
TOLERANCE = 5e-6

by_sequence = pytest.mark.parametrize("host", HOSTS)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("earlier", ["a forward pass", "a generation", "training", "an error", "an interruption"])
def test_the_inner_decoder(earlier: str) -> None:
    """Called by itself, after whatever came before, it sees what its own arguments say."""
    model = adapted(routing="sequence")
    base = model.get_base_model()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 3)
    with torch.no_grad():
        expected = base.model(input_ids=IDS, attention_mask=mask)[0]
        alone = base.model(input_ids=IDS[:, 2:], position_ids=torch.arange(2, 7)[None])[0]
    close(expected[:, 2:], alone)

    if earlier == "a forward pass":
        model(input_ids=IDS[:, :4], attention_mask=torch.tensor([[1, 0, 0, 0]] * 3))
    elif earlier == "a generation":
        model.generate(input_ids=IDS[:, :3], max_new_tokens=3, pad_token_id=0)
    elif earlier == "training":
        model.train()(**BATCH, labels=LABELS).loss.backward()
        model.eval()
    else:
        stop = KeyboardInterrupt if earlier == "an interruption" else ValueError
        handle = base.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(stop))
        with pytest.raises(stop):
            base(**BATCH, labels=LABELS)
        handle.remove()
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=IDS, attention_mask=mask)[0], expected)
        cached = base.model(input_ids=IDS[:, :6], attention_mask=mask[:, :6], use_cache=True)
        step = base.model(
            input_ids=IDS[:, 6:], attention_mask=mask, **cache_argument(base.model.forward, cache_of(cached))
        )[0]
        prompt = torch.tensor([[1] * 6 + [0]] * 3)
        close(step, base.model(input_ids=IDS, attention_mask=mask, prompt_mask=prompt)[0][:, 6:])


def gradients(model: Any, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """All forward passes before the first backward pass."""
    losses = [model(**batch).loss for batch in batches]
    found = []
    for loss in losses:
        model.zero_grad()
        loss.backward()
        found.append({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})
    return found


@by_sequence
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_passes_before_one_backward(host: str, use_reentrant: bool) -> None:
    """A recomputation sees its own pass, of both texts of a pair."""
    labels = IDS.flip(1).contiguous() if HOSTS[host].pair else LABELS
    orders = [BATCH | {"labels": labels}, {"input_ids": IDS.flip(0), "attention_mask": MASK, "labels": labels.flip(0)}]
    plain, spared = (HOSTS[host].adapted().train() for _ in range(2))
    checkpoint_layers(spared, {"use_reentrant": use_reentrant})
    spared.enable_input_require_grads()
    for found, expected in zip(gradients(spared, orders), gradients(plain, orders), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert any(gradient.any() for gradient in found.values())


def test_encoder_and_decoder_of_equal_length() -> None:
    """Which text a layer of cross-attention sees is told by its input, not by its length."""
    model = HOSTS["t5"].adapted()
    labels = IDS.flip(1).contiguous()
    with torch.no_grad():
        equal = model(**BATCH, labels=labels).logits
        padded = {name: nn.functional.pad(each, (0, 2)) for name, each in BATCH.items()}
        close(model(**padded, labels=labels).logits, equal)
        other = model(input_ids=IDS.roll(1, 1), attention_mask=MASK, labels=labels).logits
    assert not torch.allclose(other, equal, atol=1e-3)


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, LlamaForTokenClassification])
def test_labels_of_classifiers_say_nothing_about_the_prompt(kind: type) -> None:
    """All tokens decide, in training as without labels, and no neighbor does; also with one label for each column."""
    torch.manual_seed(0)
    base = kind(tiny_llama(num_labels=7).config)
    task = "TOKEN_CLS" if kind is LlamaForTokenClassification else "SEQ_CLS"
    model = adapted(base=base, routing="sequence", task_type=task)
    labels = torch.ones_like(IDS) if task == "TOKEN_CLS" else torch.ones(3, 7)
    labels[:, 0] = 0
    with torch.no_grad():
        expected = model(**BATCH).logits
        assert torch.equal(model(**BATCH, labels=labels).logits, expected)
        close(model(input_ids=IDS[:1], attention_mask=MASK[:1]).logits, expected[:1])
        padded = {name: nn.functional.pad(each, (0, 2)) for name, each in BATCH.items()}
        close(model(**padded).logits[:, :7] if task == "TOKEN_CLS" else model(**padded).logits, expected)
    model.train()(**BATCH, labels=labels).loss.backward()


PROMPT_KINDS = {
    "labels": {"labels": LABELS},
    "shift_labels": {"shift_labels": nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100)},
    "prompt_mask": {"prompt_mask": LABELS == -100},
}


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_ways_of_saying_what_the_prompt_is(kind: str) -> None:
    model = adapted(routing="sequence").train()
    expected = model(**BATCH, labels=LABELS).logits
    assert torch.equal(model(**BATCH, **PROMPT_KINDS[kind]).logits, expected)
    assert not torch.allclose(model(**BATCH, prompt_mask=MASK).logits, expected, atol=1e-3), "the negative control"


@pytest.mark.parametrize("host", ["llama", "opt", "mamba", "t5", "bart"])
def test_training_that_would_look_ahead_is_refused(host: str) -> None:
    """No labels in the forward pass, of the model or of its decoder: a mean over all tokens would see the answer."""
    model = HOSTS[host].adapted().train()
    batch = BATCH | ({"decoder_input_ids": IDS} if HOSTS[host].pair else {})
    with pytest.raises(RoutingBySequenceError, match=r"look ahead at the answers.*Pass labels, or prompt_mask="):
        model(**batch)
    if host == "llama":
        with pytest.raises(RoutingBySequenceError, match="look ahead"):
            model.get_base_model().model(**batch)
    with torch.no_grad():
        model(**batch)
    adapted(base=HOSTS[host].make(), target_modules=HOSTS[host].targets).train()(**batch)  # by token nothing is asked
    with model.disable_adapter():
        model(**batch)


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: each[row] for name, each in {**BATCH, "labels": LABELS}.items()}


def test_label_smoothing_of_the_trainer(tmp_path: Path) -> None:
    """The Trainer takes the labels out before the forward pass."""
    options: dict[str, Any] = {"report_to": "none", "use_cpu": True, "max_steps": 1, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, **options)
    trainer = Trainer(model=adapted(routing="sequence"), args=arguments, train_dataset=Rows())
    with pytest.raises(RoutingBySequenceError, match="label_smoothing_factor"):
        trainer.train()


def first_pass(model: Any) -> Any:
    return cache_of(model(input_ids=IDS[:, :4], use_cache=True))


@torch.no_grad()
def test_rows_of_a_cache_that_move() -> None:
    """The weights of a prompt follow its rows through `reorder_cache` and what contrastive search uses."""
    model = adapted(routing="sequence")
    forward = model.get_base_model().forward
    step = lambda cache, rows: model(input_ids=IDS[rows, 4:5], **cache_argument(forward, cache)).logits  # noqa: E731
    cache = first_pass(model)
    expected = step(copy.deepcopy(cache), [0, 1, 2])
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    moved, chosen = copy.deepcopy(cache), copy.deepcopy(cache)
    moved.reorder_cache(torch.tensor([2, 0, 1]))
    close(step(moved, [2, 0, 1]), expected[[2, 0, 1]])
    chosen.batch_repeat_interleave(2)
    chosen.batch_select_indices(torch.tensor([1, 4]))
    close(step(chosen, [0, 2]), expected[[0, 2]])


@torch.no_grad()
def test_a_pass_that_continues_says_what_its_tokens_are() -> None:
    """Several tokens after a cache are of the prompt or of the answer: only the caller knows."""
    model = adapted(routing="sequence")
    forward = model.get_base_model().forward
    with pytest.raises(RoutingBySequenceError, match=r"3 tokens.*prompt_mask=torch.zeros\(3, 3"):
        model(input_ids=IDS[:, 4:], **cache_argument(forward, first_pass(model)))
    answer = {"prompt_mask": torch.zeros(3, 3, dtype=torch.bool)}
    found = model(input_ids=IDS[:, 4:], **answer, **cache_argument(forward, first_pass(model))).logits
    labels = torch.cat([torch.full((3, 4), -100), IDS[:, 4:]], dim=1)
    close(found, model(**BATCH, labels=labels).logits[:, 4:])
    mixed = {"prompt_mask": torch.ones(3, 3, dtype=torch.bool)}
    with pytest.raises(RoutingBySequenceError, match="has tokens of the prompt"):
        model(input_ids=IDS[:, 4:], **mixed, **cache_argument(forward, first_pass(model)))


@torch.no_grad()
def test_what_says_nothing_about_padding_is_refused() -> None:
    model = adapted(routing="sequence")
    causal = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.raises(RoutingBySequenceError, match=r"attention_mask is a tensor of shape \(3, 1, 7, 7\)"):
        model(input_ids=IDS, attention_mask=causal)
    close(model(input_ids=IDS, attention_mask=causal, prompt_mask=MASK).logits, model(**BATCH).logits)
    layer = next(iter(hydralora_layers(model).values()))
    with pytest.raises(RoutingBySequenceError, match="outside of a forward pass"):
        layer(torch.randn(2, 3, 32))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {}])
@pytest.mark.parametrize("host", ["llama", "t5", "bart"])
@pytest.mark.parametrize("routing", ["token", "sequence"])
@pytest.mark.parametrize("configured", [False, True])
def test_adapters_of_rows_in_a_generation(options: dict[str, Any], host: str, routing: str, configured: bool) -> None:
    """One name for each input, however many rows it becomes: an encoder sees it once, a decoder for each beam."""
    model = HOSTS[host].adapted(routing=routing)
    torch.manual_seed(7)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.eval()
    limits = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    if configured:
        for name, value in options.items():
            setattr(model.generation_config, name, value)
            setattr(model.get_base_model().generation_config, name, value)
    given = limits if configured else limits | options
    names = ["default", "other", "__base__"]
    torch.manual_seed(0)
    found = model.generate(**BATCH, adapter_names=names, **given)
    count = len(found) // 3
    for row, name in enumerate(names):
        mine = found[row * count : (row + 1) * count]
        if "do_sample" in options:  # the numbers drawn differ alone: compare with the same batch, all rows of one name
            torch.manual_seed(0)
            everywhere = model.generate(**BATCH, adapter_names=[name] * 3, **given)
            assert torch.equal(mine[:, :1], everywhere[row * count : (row + 1) * count, :1])
            continue
        alone = {key: value[row : row + 1] for key, value in BATCH.items()}
        assert torch.equal(mine, model.generate(**alone, adapter_names=[name], **given))
    with pytest.raises(ValueError, match="2 adapter names for 3 rows"):
        model.generate(**BATCH, adapter_names=names[:2], **given)
