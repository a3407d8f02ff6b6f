"""The original's training loop through our Trainer: collator, loss, accumulation, clipping, AdamW, schedule, epochs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.data.collator import DataCollatorForSupervisedDataset
from llava.model.loss import LossReduction
from llava.train.freeze import freeze
from llava.train.options import DataArguments, ModelArguments, RunArguments, TrainingArguments
from mma.lavin.schedule import Schedule, absolute_learning_rate
from mma.lavin.trainer import LavinTrainer
from mma.original import original_names
from tests.golden import load_case
from tests.mma.golden_model import golden_model, spliced_rows

CASE, TENSORS = load_case("lavin", "train_loop")
HYPER = CASE["hyper_parameters"]


def epoch_items() -> list[dict[str, Any]]:
    """The samples of an epoch, batch after batch."""
    items = []
    for batch in CASE["batches"]:
        indicators = torch.tensor([int(index >= 0) for index in batch["image_index"]])
        rows = {f"in/{name}": TENSORS[f"in/{name}"][batch["rows"]] for name in ("examples", "labels")}
        ids, labels = spliced_rows(CASE, TENSORS | rows | {"in/img_indicators": indicators})
        for position, index in enumerate(batch["image_index"]):
            bank = TENSORS["in/image_bank"]
            image = bank[index] if index >= 0 else torch.zeros_like(bank[0])
            items.append({"input_ids": ids[position], "labels": labels[position], "image": image})
    return items


@pytest.mark.usefixtures("coupled")
@pytest.mark.parametrize("setting", CASE["clip_settings"])
def test_losses_rates_and_final_adapters(setting: str, tmp_path: Path) -> None:
    model, _, _ = golden_model("train_loop", tmp_path, adapter_dropout=0.0)
    model.loss_reduction = LossReduction.MICRO_BATCH
    batch, accumulated = HYPER["batch_size"], HYPER["accum_iter"]
    rate = absolute_learning_rate(HYPER["blr"], batch, accumulated, world_size=1)
    training = TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, learning_rate=rate,
        num_train_epochs=HYPER["n_epochs_run"], weight_decay=HYPER["weight_decay"], adam_beta1=0.9, adam_beta2=0.95,
        max_grad_norm=CASE["clip_settings"][setting] or 0.0, train_sampling_strategy="sequential",
        loss_reduction="micro_batch",
    )  # fmt: skip
    run = RunArguments(ModelArguments(freeze_backbone=True), DataArguments(), training, {}, {"mma": {}})
    freeze(model, run)
    trainer = LavinTrainer(
        schedule=Schedule(rate, HYPER["epochs"], HYPER["warmup_epochs"], HYPER["min_lr"]),
        run=run,
        model=model,
        train_dataset=epoch_items(),
        data_collator=DataCollatorForSupervisedDataset(SimpleNamespace(model_max_length=10_000, pad_token_id=0)),
    )
    trainer.train()
    result = CASE["results"][setting]
    updates = [number for number, one in enumerate(result["iterations"]) if one["update"]]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == len(updates) == 6  # two in each epoch; its fifth batch is left out
    for entry, last in zip(history, updates, strict=True):
        group = result["iterations"][last - accumulated + 1 : last + 1]
        assert entry["loss"] == pytest.approx(sum(one["loss"] for one in group) / accumulated, abs=1e-4)
        assert entry["learning_rate"] == pytest.approx(group[0]["lr"], rel=1e-6)
        assert entry["grad_norm"] == pytest.approx(group[-1]["grad_norm"], rel=1e-3)
    weights = dict(model.named_parameters())
    for ours, theirs in original_names(model).items():
        final = TENSORS[f"{setting}/out/final/{theirs}"]
        torch.testing.assert_close(weights[ours].detach(), final, rtol=0, atol=1e-3)
        assert not torch.equal(TENSORS[f"w/{theirs}"], final)
