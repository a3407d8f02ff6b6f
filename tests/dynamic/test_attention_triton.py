"""The Triton kernels of policy attention: interpreted on the CPU, compiled for GPUs, and run where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamic.attention.problem import Problem
from tests.dynamic.attention_cases import CASES, draw, each_case, relative_errors, run

pytest.importorskip("triton", reason="triton comes with torch on Linux only")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynamic.attention import triton_kernels
from dynamic.attention.triton_launch import constants

KERNELS = ["forward_kernel", "query_gradient_kernel", "key_gradient_kernel"]
OWN_ROUNDING = 4e-6  # exp(score - log_sum) with scores up to 30 in "dominated"; the kernels reach 6e-7
SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a block of threads may use on sm_86 and sm_89, the least since Ampere


@pytest.fixture(scope="module")
def interpreted(repository: Path) -> dict[str, dict[str, list[float]]]:
    """Errors of the interpreted kernels, from a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.dynamic.triton_interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(repository)},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout)


@pytest.mark.parametrize("name", ["hard", "dominated", "bidirectional_padded", "left_padding", "grouped"])
def test_interpreted_kernels_are_as_exact_as_eager(name: str, interpreted: dict[str, dict[str, list[float]]]) -> None:
    assert interpreted[name].keys() == {"y", "q", "k", "v", "policy"}
    for key, (error, eager) in interpreted[name].items():
        assert error <= 2 * eager + OWN_ROUNDING, f"{key}: {error:.1e}, eager {eager:.1e}"


def compile_for(generation: int, kernel: str, dtype: str, problem: Problem, want_top: bool) -> Any:
    """Compile a kernel as a launch with this problem would, without a GPU."""
    function = getattr(triton_kernels, kernel)
    given: dict[str, Any] = {**constants(problem), "WANT_TOP": want_top}
    options = {name: given.pop(name) for name in ("num_warps", "num_stages")}
    number = f"*{dtype}"
    types = {
        name: number for name in ("q_ptr", "k_ptr", "v_ptr", "output_ptr", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    }
    types |= {"key_mask_ptr": "*i8", "top_key_ptr": "*i64", "heads": "i32", "length": "i32", "scale": "fp32"}
    signature = {name: "constexpr" if name in given else types.get(name, "*fp32") for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name.endswith("_ptr")}
    used = {name: given[name] for name in function.arg_names if name in given}
    source = ASTSource(fn=function, signature=signature, constexprs=used, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)


@pytest.mark.parametrize(("generation", "dtype"), [(80, "bf16")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_and_fit_into_shared_memory(
    kernel: str, generation: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(1, 2, 64, 128, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    mask = torch.ones(1, 64, dtype=torch.bool)
    problem = Problem(x, x[:, :1], x[:, :1], torch.ones(1, 64), True, mask, None, 0.1)
    compiled = compile_for(generation, kernel, dtype, problem, want_top=True)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SMALLEST_SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_case
def test_kernels_on_a_gpu_are_as_exact_as_eager(name: str, dtype: torch.dtype, eps: float) -> None:
    case = CASES[name]
    long = case._replace(shape=(*case.shape[:3], 300, 64))
    tensors, arguments = draw(long, dtype)
    doubles = {key: value.detach().double().requires_grad_() for key, value in tensors.items()}
    exact = run(doubles, implementation="eager", eps=eps, **arguments)
    on_gpu = {key: value.detach().cuda().requires_grad_() for key, value in tensors.items()}
    found = run(on_gpu, implementation="triton", eps=eps, **arguments)
    allowed = relative_errors(run(tensors, implementation="eager", eps=eps, **arguments), exact)
    for key, error in relative_errors({key: value.cpu() for key, value in found.items()}, exact).items():
        assert error <= 2 * allowed[key] + OWN_ROUNDING, f"{key}: {error:.1e}, eager {allowed[key]:.1e}"
