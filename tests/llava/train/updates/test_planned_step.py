"""A training step from a planned batch: how often the host waits for the device, and what the compiler makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava.model.checkpoint import bare_model
from llava.train.train import build_run, parse_args
from tests.host_waits import host_waits
from tests.llava.train.test_training import HYDRA, command_line

# Options of a run, by what is attached.
RUNS: dict[str, dict[str, Any]] = {
    "nothing": {"freeze_mm_mlp_adapter": True},
    "hydralora": HYDRA,
    "dynamic": {"dynamic": True, "sparse_layer": 1},
    "mma": {"mma": True, "visual_input": "llava"},
}


def test_what_counts_as_a_wait() -> None:
    values = torch.arange(6)
    with host_waits() as found:
        values.sum()
        values[torch.tensor([1, 2])]
        values.masked_fill(values > 2, 0)
    assert not found
    with host_waits() as found:
        bool(values[0] == 0)
        values.max().item()
        values.tolist()
        values[values > 2]
        values.nonzero()
    assert len(found) == 5


def step(model: nn.Module, call: Any, batch: dict[str, Any]) -> list[Tensor]:
    """Loss and gradients of one step, with the same draws each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    output = call(**batch)
    output.loss.backward()
    return [output.loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


@pytest.mark.parametrize("name", RUNS)
def test_one_wait_and_one_break_at_most(name: str, tmp_path: Path) -> None:
    """The one wait is the Trainer's look at the loss; compiled, loss and gradients are those of plain execution."""
    run = build_run(parse_args(command_line(tmp_path / "out", **RUNS[name])))
    batch = run.trainer.data_collator([run.dataset[index] for index in range(3)])
    assert len({len(segments.images) for segments in batch["plan"].segments}) > 1, "with and without image"
    model = bare_model(run.model)
    run.model.train()
    run.trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    run.trainer.training_step(run.model, batch, torch.tensor(20))  # what is made once
    with host_waits() as found:
        run.trainer.training_step(run.model, batch, torch.tensor(20))
    assert len(found) <= 1, found
    plain = {key: value for key, value in batch.items() if key != "plan"}
    with host_waits() as without_plan:
        model(**plain)
    assert len(without_plan) > 1, "ids without a plan are looked at"

    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    expected = step(run.model, run.model, batch)
    torch.compiler.reset()
    compiled = torch.compile(run.model, backend=backend)
    found_values = step(run.model, compiled, batch)
    assert 1 <= len(graphs) <= 2
    assert len(found_values) == len(expected) > 3
    for value, wanted in zip(found_values, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()
