"""Adapters on models that libraries split over processes: two updates equal those of one process, and nothing hangs.

One launch of two processes on the CPU trains all models (`process_runs.py`), because starting takes longest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from hydralora import set_gradient_scale
from tests.hydralora.tuner.models import adapted, tiny_llama
from tests.llava.train.launching import launch_runs

PROGRAM = Path(__file__).with_name("process_runs.py")
LR = 0.5
SEVERAL = 2
"""Rows of a process."""

CASES: dict[str, dict[str, Any]] = {
    "pooled": {},
    "batch": {"balance": "batch"},
    "best by sequence": {"top_k": 2, "routing": "sequence", "balance": "batch", "information_weight": 0.3},
}
LIBRARIES = ("ddp", "fsdp1", "fsdp2", "zero3")
ROWS = torch.randint(3, 80, (2 * SEVERAL, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(ROWS)
MASK[1, 4:], MASK[2, 3:] = 0, 0


def build(**changes: Any) -> PeftModel:
    return adapted(base=tiny_llama(), **{"balance_weight": 0.7} | changes).train()


def batch_of(process: int) -> dict[str, Any]:
    """The rows of one process, of which the processes have differently many tokens."""
    rows = slice(SEVERAL * process, SEVERAL * (process + 1))
    labels = ROWS[rows].masked_fill(MASK[rows] == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ROWS[rows], "attention_mask": MASK[rows], "labels": labels, "use_cache": False}


def by_one_process(changes: dict[str, Any]) -> dict[str, Tensor]:
    """The trained weights: the losses of the processes are averaged, each with the balance of its own rows."""
    model = build(**changes)
    set_gradient_scale(model, micro_batches=2)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=LR)
    for _ in range(2):
        for process in range(2):
            (model(**batch_of(process)).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, compiled_extensions: Path) -> Path:
    pytest.importorskip("deepspeed", reason="the extra 'train' is not installed")
    path = tmp_path_factory.mktemp("processes")
    runs = [{"name": name, "library": library, "folder": str(path)} for library in LIBRARIES for name in CASES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(compiled_extensions))
        launch_runs(2, runs, path, program=PROGRAM)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, folder: Path) -> None:
    start = dict(build(**CASES[name]).named_parameters())
    expected = by_one_process(CASES[name])
    assert all((start[name] - weight).abs().max() > 1e-5 for name, weight in expected.items()), "all weights moved"
    for library in LIBRARIES:
        found = torch.load(folder / f"{name} {library}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for weight, value in expected.items():
            torch.testing.assert_close(
                found[weight], value, rtol=0, atol=1e-6, msg=lambda text, at=(library, weight): f"{at}: {text}"
            )
    unbalanced = by_one_process(CASES[name] | {"balance_weight": 0.0})
    assert any((unbalanced[weight] - value).abs().max() > 1e-4 for weight, value in expected.items())


@pytest.mark.slow
def test_a_split_model_is_saved_whole(folder: Path) -> None:
    """The last one of FSDP2; it is read in one process."""
    last = list(CASES)[-1]
    model = PeftModel.from_pretrained(tiny_llama(), str(folder / "adapter"), is_trainable=True)
    expected = torch.load(folder / f"{last} fsdp2.pt", weights_only=True)
    parameters = dict(model.named_parameters())
    assert expected
    assert all(torch.equal(parameters[name], weight) for name, weight in expected.items())
