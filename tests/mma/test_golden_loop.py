"""The original's training loop, iteration by iteration, through our model, freezing and parameter groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.train.freeze import freeze
from llava.train.optimizer import optimizer_groups
from llava.train.options import ModelArguments, RunArguments
from mma.original import original_names
from tests.mma.golden_model import golden_model, spliced_rows
from tests.mma.test_counts import Training


@pytest.mark.usefixtures("coupled")
@pytest.mark.parametrize("setting", ["noclip", "clip"])
def test_iterations(setting: str, tmp_path: Path) -> None:
    """Losses, gradient norms and the final adapters; the learning rates are those that the original had set."""
    model, case, tensors = golden_model("train_loop", tmp_path, adapter_dropout=0.0)
    hp, bank = case["hyper_parameters"], tensors["in/image_bank"]
    args = RunArguments(ModelArguments(freeze_backbone=True), None, Training(), {"mma": None}, {"mma": {}})
    args.training.weight_decay = hp["weight_decay"]
    freeze(model, args)
    model.train()
    groups = [group for group in optimizer_groups(model, args) if group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    trained = [weight for group in groups for weight in group["params"]]
    expected = iter(case["results"][setting]["iterations"])
    for _ in range(hp["n_epochs_run"]):
        optimizer.zero_grad()
        for batch in case["batches"]:
            iteration = next(expected)
            for group in optimizer.param_groups:
                group["lr"] = iteration["lr"]
            rows, places = batch["rows"], batch["image_index"]
            images = torch.stack([bank[index] if index >= 0 else torch.zeros_like(bank[0]) for index in places])
            own = {f"in/{name}": tensors[f"in/{name}"][rows] for name in ("examples", "labels")}
            own["in/img_indicators"] = torch.tensor([int(index >= 0) for index in places])
            ids, labels = spliced_rows(case, tensors | own)
            loss = model(input_ids=ids, labels=labels, images=images, attention_mask=torch.ones_like(ids)).loss
            assert loss.item() == pytest.approx(iteration["loss"], abs=1e-4)
            (loss / hp["accum_iter"]).backward()
            if iteration["update"]:
                limit = case["clip_settings"][setting]
                norm = torch.nn.utils.clip_grad_norm_(trained, float("inf") if limit is None else limit)
                assert norm.item() == pytest.approx(iteration["grad_norm"], rel=1e-3)
                optimizer.step()
                optimizer.zero_grad()
    assert next(expected, None) is None
    weights = dict(model.named_parameters())
    for ours, theirs in original_names(model).items():
        start, final = tensors[f"w/{theirs}"], tensors[f"{setting}/out/final/{theirs}"]
        torch.testing.assert_close(weights[ours].detach(), final, rtol=0, atol=1e-3)
        assert not torch.equal(start, final)
