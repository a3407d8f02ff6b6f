"""Means of an evaluation against numbers worked out by hand, and the shares of several processes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava.errors import BadSampleError
from llava.runtime.monitoring.losses import (
    NO_TARGET,
    Losses,
    Reduction,
    RowLosses,
    over_batches,
    over_positions,
    over_targets,
    row_losses,
)
from llava.runtime.monitoring.shares import ShareSampler
from llava.runtime.monitoring.trainer import MonitoredTrainer
from llava.runtime.monitoring.untouched import untouched

FIRST = RowLosses(torch.tensor([6.0, 4.0]), torch.tensor([3, 1]), 5, {"plugin/balance": torch.tensor(0.5)})
SECOND = RowLosses(torch.tensor([1.0, 0.0]), torch.tensor([2, 0]), 4, {"plugin/balance": torch.tensor(1.5)})


def measured(reduction: Reduction) -> Losses:
    """Two processes, each with a batch of two rows; the last row has no target."""
    one, two = Losses(reduction), Losses(reduction)
    one.add([0, 1], FIRST, [["image"], ["text", "task_x"]], [None, None])
    two.add([2, 3], SECOND, [["text"], ["text"]], [None, None])
    return one.merge((one, two))


@pytest.mark.parametrize(
    ("reduction", "loss", "text"),
    [
        (over_targets, 11 / 6, 5 / 3),
        (over_batches, (10 / 4 + 1 / 2) / 2, (4 + 1 / 2) / 2),
        (over_positions, 11 / (2 * 5 + 4), 5 / (5 + 4)),
    ],
)
def test_means(reduction: Reduction, loss: float, text: float) -> None:
    metrics = measured(reduction).metrics("eval")
    assert metrics["eval_loss"] == pytest.approx(loss)
    assert metrics["eval_text_loss"] == pytest.approx(text)
    assert metrics["eval_plugin/balance_loss"] == pytest.approx(1.0)
    assert (metrics["eval_rows"], metrics["eval_rows_left_out"]) == (3, 1)
    assert next(iter(metrics)) == "eval_loss"


def test_rows_without_a_target_are_named_and_in_no_mean() -> None:
    losses = measured(over_targets)
    assert losses.left_out == {3: NO_TARGET}
    empty = Losses(over_batches)
    empty.add([7], RowLosses(torch.zeros(1), torch.zeros(1, dtype=torch.int64), 3, {}), [["text"]], ["cannot be read"])
    with pytest.raises(BadSampleError, match=r"none of the 1 rows.*row 7: cannot be read"):
        empty.metrics("eval")


def test_losses_of_rows_are_those_of_torch() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels[0, :3] = labels[2, 1:] = -100
    found = row_losses(logits, labels)
    for row in range(3):
        loss = nn.functional.cross_entropy(logits[row, :-1], labels[row, 1:], reduction="sum")
        assert found.totals[row].item() == pytest.approx(loss.item(), rel=1e-5)
    assert found.targets.tolist() == [3, 5, 0]
    assert found.positions == 5


class WithoutChoice(LlamaForCausalLM):
    """A model that gives all logits, whoever asks."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("trained", [slice(5, 9), slice(0, 0)], ids=["answers", "nothing"])
@pytest.mark.parametrize("kind", ["plain", "adapted", "without the choice"])
def test_a_language_model_gives_the_logits_that_count(kind: str, trained: slice) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    class_ = WithoutChoice if kind == "without the choice" else LlamaForCausalLM
    model: Any = class_(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    if kind == "adapted":
        model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    ids = torch.randint(0, 60, (3, 12))
    labels = torch.full_like(ids, -100)
    labels[0, trained] = ids[0, trained]
    labels[2, trained] = ids[2, trained]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made: list[int] = []
    head = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    head.register_forward_hook(lambda module, args, logits: made.append(logits.shape[1]))
    with torch.no_grad():
        expected = row_losses(model(**batch).logits, labels)
        found = MonitoredTrainer.row_losses(None, model, batch | {"labels": labels})  # type: ignore[arg-type]
    torch.testing.assert_close(found.totals, expected.totals, rtol=1e-5, atol=1e-6)
    assert found.targets.tolist() == expected.targets.tolist()
    assert found.positions == expected.positions == 11
    assert made == [12, 12 if kind == "without the choice" else max(1, len(range(12)[trained]))]


@pytest.mark.parametrize(("rows", "batch", "processes"), [(10, 2, 2), (9, 2, 2), (1, 4, 3), (7, 1, 4)])
def test_every_row_counts_once_and_all_make_equally_many_passes(rows: int, batch: int, processes: int) -> None:
    samplers = [ShareSampler(rows, batch, process, processes) for process in range(processes)]
    assert len({len(sampler) for sampler in samplers}) == 1
    counted = [
        row
        for sampler in samplers
        for rows_of_batch, counts in zip(sampler, sampler.counted(), strict=True)
        if counts
        for row in rows_of_batch
    ]
    assert sorted(counted) == list(range(rows))
    assert all(batch for sampler in samplers for batch in sampler)


def test_untouched_puts_modes_and_random_states_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()

    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with untouched(model):
        draws()
        assert not any(module.training for module in model.modules())
    assert draws() == expected
    assert [module.training for module in model.modules()] == [True, True, False, False]
