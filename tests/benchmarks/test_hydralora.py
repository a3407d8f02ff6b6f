"""The benchmark program on tiny sizes: what it compares is equal, what it counts is right, what it writes is complete.

No test here looks at a time: a busy machine must not fail one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import hydralora
from benchmarks.measuring import STEPS, interleaved_times, saved_bytes, spread
from benchmarks.methods import Case, build_methods, trained_parameters
from benchmarks.record import aim_lines
from llava.errors import FlagError

ROOT = Path(__file__).resolve().parents[2]
WIDTH, INNER, RANK, TOKENS, FLOAT = 24, 40, 4, 10, 4
CASES = {f"{kind}_e{experts}": (kind, experts) for kind in ("layer", "block") for experts in (1, 3)}
each_case = pytest.mark.parametrize(("kind", "experts"), CASES.values(), ids=CASES)


def build(kind: str, experts: int, dropout: float = 0.0) -> tuple[Case, dict[str, nn.Module]]:
    case = Case(kind, WIDTH, INNER, experts, RANK, dropout)
    return case, build_methods(case, torch.device("cpu"), torch.float32)


def loop_gradients(loop: Any, kind: str) -> dict[str, Tensor]:
    """Gradients of the loop in the order and the shapes of ours."""
    if kind == "layer":
        projections = {"": loop.projection}
        found = {} if loop.router is None else {"router": loop.router.weight.grad}
    else:
        projections = {"gate": loop.gate, "up": loop.up, "down": loop.down}
        found = {"router": loop.router.weight.grad, "router bias": loop.router.bias.grad}
    for name, projection in projections.items():
        found[f"A {name}"] = projection.shared_a.grad
        found[f"B {name}"] = torch.stack([matrix.grad for matrix in projection.experts_b])
    return found


def our_gradients(module: Any, kind: str) -> dict[str, Tensor]:
    """Gradients of the tuner's layer or of the routed block under the same names."""
    if kind == "layer":
        layer = module.projection
        named = (("router", layer.lora_router), ("A ", layer.lora_A))
        parts = {name: part["default"] for name, part in named if "default" in part}
        experts = layer.lora_B["default"]
        stacked = torch.stack(experts.weight.grad.chunk(experts.experts, dim=1))  # (E, out_features, r)
        return {name: part.weight.grad for name, part in parts.items()} | {"B ": stacked}
    found = {"router": module.router.weight.grad, "router bias": module.router.bias.grad}
    for name in ("gate", "up", "down"):
        found[f"A {name}"] = getattr(module, f"shared_A_{name}").grad
        found[f"B {name}"] = getattr(module, f"experts_B_{name}").grad
    return found


@each_case
def test_the_loop_computes_what_ours_computes(kind: str, experts: int) -> None:
    """Outputs and all gradients, without dropout: the loop draws a mask for every expert, ours one for all."""
    case, methods = build(kind, experts)
    cotangent = torch.randn(1, TOKENS, case.outputs)
    results = {}
    for name in ("loop", "hydralora"):
        x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5)).requires_grad_()
        y = methods[name](x)
        y.backward(cotangent)
        gradients = (loop_gradients if name == "loop" else our_gradients)(methods[name], kind)
        results[name] = {"y": y, "x": x.grad} | gradients
    assert results["loop"].keys() == results["hydralora"].keys()
    for name, value in results["loop"].items():
        # Measured: 4e-7 of the largest entry.
        tolerance = 1e-5 * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            results["hydralora"][name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m
        )
    x = torch.randn(1, TOKENS, WIDTH)
    assert (methods["hydralora"](x) - methods["frozen"](x)).abs().max() > 0.1, "the experts act"


@each_case
def test_the_sizes_that_are_compared(kind: str, experts: int) -> None:
    _, methods = build(kind, experts)
    sizes = {name: trained_parameters(module) for name, module in methods.items()}
    projections = 1 if kind == "layer" else 3
    per_rank = projections * (WIDTH + INNER)
    assert sizes["frozen"] == 0
    assert sizes["lora"] == RANK * per_rank
    assert sizes["loop"] == sizes["hydralora"]
    assert abs(sizes["lora_matched"] - sizes["hydralora"]) <= per_rank / 2


class Squared(nn.Module):
    """Keeps x for the parameter's gradient and (twice) the product for the square; the detour leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        (x.exp() * 2).sum()
        product = x @ self.weight
        return product * product


def test_kept_bytes_of_a_known_graph() -> None:
    """The input and the product once each; neither the parameter, nor what only a dead branch kept."""
    assert saved_bytes(Squared(), torch.randn(TOKENS, WIDTH, requires_grad=True)) == 2 * TOKENS * WIDTH * FLOAT


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("experts", [2, 5])
def test_kept_bytes_of_a_layer(experts: int, dropout: float) -> None:
    """The formula of each method: x, the mask of its dropout, codes, probabilities; nothing for the frozen layer."""
    _, methods = build("layer", experts, dropout)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    kept = {name: saved_bytes(module, x) for name, module in methods.items()}
    batch, code, routing = (TOKENS * size * FLOAT for size in (WIDTH, RANK, experts))
    assert kept["frozen"] == 0
    assert kept["lora"] == (batch if dropout == 0 else 2 * batch) + code
    assert kept["hydralora"] == batch + (0 if dropout == 0 else batch // FLOAT) + code + routing
    assert kept["loop"] > kept["lora"] + experts * TOKENS * INNER * FLOAT


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@each_case
def test_we_keep_no_more_than_lora_and_the_routed_activations(kind: str, experts: int, dropout: float) -> None:
    case, methods = build(kind, experts, dropout)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    allowed = saved_bytes(methods["lora"], x) + case.routed_bytes(TOKENS, torch.float32)
    for name in {"hydralora", "hydralora_sparse"} & methods.keys():
        assert saved_bytes(methods[name], x) <= allowed
    if kind == "block" or experts > 1:  # a layer of one expert has no router
        assert saved_bytes(methods["loop"], x) > allowed


def test_methods_take_turns() -> None:
    """Every method once in each round, each round beginning with another one."""
    order: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            order.append(self.name)
            return x * 1

    ticks = iter(range(1000))
    methods = {name: Noted(name) for name in "abc"}
    x = torch.ones(1, 2, 3, requires_grad=True)
    clock = hydralora.Clock("counted", lambda: next(ticks))
    times = interleaved_times(methods, x, torch.ones(1, 2, 3), clock, 2, 1, lambda: None)
    assert "".join(order) == "abcbcacab"
    assert times == {name: [1000.0] * 2 for name in "abc"}


def test_spread() -> None:
    found = spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found == {"min": 1.0, "lower_quartile": 2.0, "median": 3.0, "upper_quartile": 4.0, "max": 5.0}
    assert set(spread([7.0]).values()) == {7.0}


def test_ratios_are_taken_within_a_round() -> None:
    times = {"frozen": [1.0, 10.0], "lora": [2.0, 20.0], "lora_matched": [4.0, 40.0]}
    times |= {"hydralora": [3.0, 30.0], "loop": [6.0, 60.0]}
    found = hydralora.ratios(times)
    assert {name: value["median"] for name, value in found.items()} == {
        "to_lora": 1.5,
        "to_lora_matched": 0.75,
        "loop_to_hydralora": 2.0,
        "loop_to_lora": 3.0,
        "update_loop_to_hydralora": 2.5,
    }


def test_aims_name_the_cases_that_miss_them() -> None:
    case = {"kind": "layer", "width": 8, "inner": 8, "experts": 3, "dropout": 0.0, "compiled": False}
    case |= {"memory": {"gap_bytes": -4}}
    good = case | {"ratios": {"to_lora": {"median": 1.1}, "loop_to_hydralora": {"median": 1.9}}}
    bad = case | {"ratios": {"to_lora": {"median": 1.3}, "loop_to_hydralora": {"median": 1.9}}}
    assert [line.partition(": ")[2] for line in aim_lines([good, good])] == ["reached in 1 of 1 cases."] * 3
    lines = aim_lines([good, bad])  # one of the passes misses it
    assert "reached in 0 of 1 cases; missed by layer 8 x 8, E 3, dropout 0." in lines[0]
    assert "reached in 1 of 1" in lines[1]


def test_aims_of_decoding() -> None:
    """For any number of experts; nothing is kept for backward."""
    token = {"kind": "token", "width": 8, "inner": 8, "dropout": 0.0, "compiled": False}
    cases = [token | {"experts": e, "ratios": {"to_lora": {"median": ratio}}} for e, ratio in ((3, 1.1), (8, 1.11))]
    (line,) = aim_lines(cases)
    assert line.startswith("- One token, at most 1.10 times LoRA of the same rank: reached in 1 of 2 cases; ")
    assert line.endswith("missed by token 8 x 8, E 8, dropout 0.")


def test_decoding_is_timed_without_gradients_and_for_one_pass() -> None:
    calls: list[bool] = []

    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return x

    ticks = iter(range(1000))
    clock = hydralora.Clock("counted", lambda: next(ticks))
    times = interleaved_times({"a": Noted()}, torch.ones(1, 1, 3), None, clock, 2, 1, lambda: None)
    assert calls == [False] * 3 * STEPS
    assert times == {"a": [1000.0 / STEPS] * 2}


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "tiny.json"
    sizes = ["--widths", "16x24", "--blocks", "16x24", "--decode", "16", "--experts", "1", "3", "--dropout", "0.05"]
    few = ["--tokens", "8", "--rank", "2", "--repeats", "3", "--warmup", "1", "--passes", "2"]
    arguments = ["--device", "cpu", *sizes, *few, "--output", str(output)]
    hydralora.main(arguments)
    record = json.loads(output.read_text())
    assert {"date", "command", "versions", "commit", "uncommitted_changes", "machine", "settings", "cases"} == set(
        record
    )
    assert record["command"] == " ".join(["python -m benchmarks.hydralora", *arguments])
    assert record["machine"]["cpu"]
    assert {"python", "torch", "peft"} <= set(record["versions"])
    assert record["settings"]["clock"] == "process"
    assert [case["pass"] for case in record["cases"]] == [1] * 6 + [2] * 6
    decoded = [case for case in record["cases"] if case["kind"] == "token"]
    assert [(case["experts"], case["dropout"]) for case in decoded] == [(1, 0.0), (3, 0.0)] * 2
    assert all(case["ratios"]["to_lora"]["median"] > 0 for case in decoded)
    for case in record["cases"]:
        if case["kind"] == "token":
            continue
        names = {"frozen", "lora", "lora_matched", "loop", "hydralora"}
        names |= {"hydralora_sparse"} if case["kind"] == "block" else set()
        assert set(case["methods"]) == names
        for values in case["methods"].values():
            assert values["milliseconds"]["min"] <= values["milliseconds"]["median"]
            assert values["peak_bytes"] is None
        assert case["memory"]["gap_bytes"] <= 0
        assert {"to_lora", "to_lora_matched", "loop_to_hydralora", "loop_to_lora"} <= set(case["ratios"])
    page = output.with_suffix(".md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(("| layer", "| block", "| token"))]
    assert len(rows) == 6
    assert rows[0] in capsys.readouterr().out
    assert sorted(path.name for path in output.parent.iterdir()) == ["tiny.json", "tiny.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--dropout", "1"], "probabilities below 1"), (["--output", "table.txt"], r"ends in \.json")],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        hydralora.main(["--device", "cpu", *arguments])


@pytest.mark.parametrize(
    "arguments", [["--widths", "0"], ["--widths", "4x"], ["--widths", "4x0"], ["--tokens", "-1"], ["--rank", "two"]]
)
def test_wrong_numbers_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        hydralora.parse_args(arguments)


def test_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FlagError, match="finds no GPU"):
        hydralora.parse_args(["--device", "cuda"])


def test_it_runs_as_a_file_too() -> None:
    """Its folder must not hide the package of the same name."""
    command = [sys.executable, "benchmarks/hydralora.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--experts" in done.stdout


@pytest.mark.gpu
def test_the_program_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "tiny.json"
    sizes = ["--widths", "64", "--blocks", "64x96", "--experts", "3", "--tokens", "32", "--repeats", "2"]
    hydralora.main(["--device", "cuda", *sizes, "--output", str(output)])
    for case in json.loads(output.read_text())["cases"]:
        assert all(values["peak_bytes"] > 0 for values in case["methods"].values())
