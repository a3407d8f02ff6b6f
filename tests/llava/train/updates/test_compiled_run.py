"""`--torch_compile True`: the graphs of a step with every extension, and a run that is the uncompiled one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from llava.errors import FlagError
from llava.model.checkpoint import bare_model
from llava.model.compiled import compile_layers, uncompiled
from llava.model.formats import read_tensors
from llava.runtime import checkpointing
from llava.train.train import build_run, main, parse_args
from tests.llava.train.evaluation.common import evaluated_line, evaluations
from tests.llava.train.test_training import HYDRA, command_line, losses

CHECKPOINTED = {"gradient_checkpointing": True}
PACKED = {"packing": True, "model_max_length": 512}
LORA = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0}
ROUTED = HYDRA | {"lora_dropout": 0.0, "moe_balance_w": 0.5, "hydralora_modules": "attention", "hydralora_dropout": 0.0}
DYNAMIC = {"dynamic": True, "sparse_layer": 1}
MMA = {"mma": True, "visual_input": "llava", "adapter_dropout": 0.0}

RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "hydralora, packed, checkpointed": (ROUTED | PACKED | CHECKPOINTED, 3),
    "dynamic and lora, checkpointed": (DYNAMIC | LORA | CHECKPOINTED, 3),
    "mma": (MMA, 6),
}
"""Options, and the graphs of all layers: of the tower, of the decoder, and of layers that take something else."""

BATCHES = ((0, 1, 2), (3, 4, 5), (1, 2, 6), (0, 1, 2, 3))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def step(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Losses and gradients of one step, with the same draws each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    output = model(**batch, skip_logits=True)
    output.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: loss.detach() for name, loss in output.losses.items()} | gradients


@pytest.mark.parametrize("name", RUNS)
def test_a_step_has_few_graphs_for_all_lengths(name: str, tmp_path: Path) -> None:
    """No break; what the first batch compiles serves other lengths and numbers of rows; all numbers are the same."""
    options, graphs = RUNS[name]
    run = build_run(parse_args(command_line(tmp_path / "out", per_device_train_batch_size=4, **options)))
    if checkpointing.is_checkpointed(run.args.training):
        checkpointing.switch_on(run.model, run.args.training)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in run.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight) if weight.requires_grad else 0)
    run.model.train()
    batches = [run.trainer.data_collator([run.dataset[index] for index in rows]) for rows in BATCHES]
    assert len({batch["plan"].input_ids.shape for batch in batches}) == len(BATCHES)
    names = list(run.model.state_dict())
    expected = [step(run.model, batch) for batch in batches]
    counter, seen = CompileCounter(), []
    compile_layers(bare_model(run.model), counter)
    for batch, wanted in zip(batches, expected, strict=True):
        found = step(run.model, batch)
        seen.append(counter.frame_count)
        assert found.keys() == wanted.keys()
        assert len(found) > 5
        for key, value in wanted.items():
            # Measured: 0, the operations are those of plain execution.
            assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-9), key
    assert not counters["graph_break"]
    assert seen == [graphs] * len(BATCHES)
    assert list(run.model.state_dict()) == names


def weights(folder: Path) -> dict[str, Tensor]:
    files = [path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path.relative_to(folder))]
    assert files
    return {f"{path.relative_to(folder)}/{name}": value for path in files for name, value in read_tensors(path).items()}


def test_a_run_is_the_uncompiled_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses, evaluations, answers, names and weights, with checkpointed dropout; it resumes."""
    options = LORA | CHECKPOINTED | {"lora_dropout": 0.3}
    compiled = options | {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    plain, whole, cut = tmp_path / "plain", tmp_path / "whole", tmp_path / "cut"
    main(evaluated_line(plain, tmp_path, **options))
    assert not counters["stats"]
    main(evaluated_line(whole, tmp_path, **compiled))
    assert 3 <= counters["stats"]["unique_graphs"] <= 8
    assert not counters["graph_break"]
    assert "compile     5 layers by aot_eager" in capsys.readouterr().out
    # Measured: 0, as above.
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-6)
    for found, expected in zip(evaluations(whole), evaluations(plain), strict=True):
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
        assert found["eval_asked_accuracy"] == expected["eval_asked_accuracy"]
    found_weights, expected_weights = weights(whole), weights(plain)
    assert found_weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(found_weights[name], value, rtol=1e-5, atol=1e-6)
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    main(evaluated_line(cut, tmp_path, **compiled))
    assert losses(cut) == losses(whole)
    assert all(torch.equal(value, found_weights[name]) for name, value in weights(cut).items())


def test_layers_run_uncompiled_where_asked(tmp_path: Path) -> None:
    run = build_run(parse_args(command_line(tmp_path / "out")))
    counter = CompileCounter()
    compile_layers(bare_model(run.model), counter)
    batch = run.trainer.data_collator([run.dataset[0], run.dataset[1]])
    with torch.no_grad(), uncompiled():
        run.model(**batch)
    assert counter.frame_count == 0  # not so in the test of a step


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"torch_compile_backend": "eager"}, "--torch_compile_backend eager: must be one of inductor"),
    "mode": ({"torch_compile_mode": "reduce-overhead"}, "--torch_compile_mode reduce-overhead: must be one of"),
    "bits": ({**LORA, "bits": 4}, "--torch_compile True and --bits 4: kernels of bitsandbytes"),
    "reentrant": (
        {**CHECKPOINTED, f"{checkpointing.OPTIONS}": '{"use_reentrant": true}'},
        "use_reentrant true: torch's compiler supports the other kind",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_combined(name: str, tmp_path: Path) -> None:
    options, words = REFUSED[name]
    with pytest.raises(FlagError) as raised:
        parse_args(command_line(tmp_path / "out", torch_compile=True, **options))
    assert words in str(raised.value)


def test_a_compiler_is_needed_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = command_line(tmp_path / "out", torch_compile=True)
    parse_args(line)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FlagError, match=r"'no-such-compiler' is not installed; install g\+\+"):
        parse_args(line)
    parse_args([*line, "--torch_compile_backend", "aot_eager"])
