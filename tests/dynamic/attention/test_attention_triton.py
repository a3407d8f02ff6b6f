"""The Triton kernels of policy attention: interpreted on the CPU, compiled for GPUs, and run where there is one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynamic.attention import blockwise
from dynamic.attention.problem import Forward, Gradients, Problem
from tests.dynamic.attention.attention_cases import CASES, draw, each_case, relative_errors, run

pytest.importorskip("triton", reason="triton comes with torch on Linux only")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynamic.attention import triton_kernels, triton_launch
from dynamic.attention.triton_launch import constants

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = [(generation, dtype, width) for generation in (80, 90) for dtype in DTYPES for width in (64, 96, 128)]
QUICK = [(80, "bf16", 128)]
SPILLED = {"bf16": 0, "fp16": 0, "fp32": 32}
"""Bytes of registers that a thread may keep in memory; measured: 0, 0 and 16."""
KERNELS = ["forward_kernel", "query_gradient_kernel", "key_gradient_kernel"]
OWN_ROUNDING = 4e-6  # exp(score - log_sum) with scores up to 30 in "dominated"; the kernels reach 6e-7
SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a block of threads may use on sm_86 and sm_89, the least since Ampere


@pytest.fixture(scope="module")
def interpreted(repository: Path) -> dict[str, dict[str, list[float]]]:
    """Errors of the interpreted kernels, from a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.dynamic.attention.triton_interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(repository)},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout)


@pytest.mark.parametrize(
    "name", ["hard", "dominated", "bidirectional_padded", "left_padding", "grouped", "right_padding"]
)
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


@pytest.fixture(scope="module")
def kernel_cache(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Compiled kernels, kept from one session to the next."""
    folder = request.config.cache.mkdir("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


def spilled_bytes(compiled: Any, generation: int, folder: Path) -> int:
    """What a thread stores of its registers in memory, as the assembler in triton's wheel says; noted in `folder`."""
    note = folder / f"{compiled.hash}.spilled"
    if not note.is_file():
        nvidia = pytest.importorskip("triton.backends.nvidia.compiler")
        if not hasattr(nvidia, "get_ptxas"):
            pytest.skip("this triton does not say where its assembler (ptxas) is")
        source = folder / f"{compiled.hash}.ptx"
        source.write_text(compiled.asm["ptx"], encoding="utf-8")
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])
        assert target is not None
        words = ["-v", f"--gpu-name={target[1]}", str(source), "-o", os.devnull]
        said = subprocess.run(
            [nvidia.get_ptxas(generation).path, *words], capture_output=True, text=True, check=True
        ).stderr
        found = re.findall(r"(\d+) bytes spill stores", said)
        assert found, said
        partial = folder / f"{compiled.hash}.{os.getpid()}"
        partial.write_text(str(max(map(int, found))), encoding="utf-8")
        partial.replace(note)
    return int(note.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("generation", "dtype", "width"),
    [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in TARGETS],
)
def test_kernels_compile_and_fit_into_registers_and_shared_memory(
    generation: int, dtype: str, width: int, kernel_cache: Path
) -> None:
    """Every kernel for A100 and H100; a whole table takes about a minute when nothing is cached."""
    x = torch.empty(1, 2, 64, width, dtype=DTYPES[dtype])
    mask = torch.ones(1, 64, dtype=torch.bool)
    problem = Problem(x, x[:, :1], x[:, :1], torch.ones(1, 64), True, mask, None, 0.1)
    for kernel in KERNELS:
        compiled = compile_for(generation, kernel, dtype, problem, want_top=True)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SMALLEST_SHARED_MEMORY, kernel
        assert spilled_bytes(compiled, generation, kernel_cache) <= SPILLED[dtype], kernel


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


class Tf32(TorchDispatchMode):
    """Products of float32 matrices get factors of 10 bits, as on a GPU with `--tf32 True`."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            args = [self.shortened(each) for each in args]
        return function(*args, **(kwargs or {}))

    @staticmethod
    def shortened(factor: Tensor) -> Tensor:
        if factor.dtype != torch.float32:
            return factor
        return (factor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def exact_forward(problem: Problem, want_top: bool) -> Forward:
    """What flawless kernels give: computed in float64, rounded to float32."""
    wide = problem._replace(**{name: getattr(problem, name).double() for name in ("q", "k", "v", "policy")})
    output, log_sum, top, top_key = blockwise.blockwise().forward(wide, want_top)
    return Forward(output.float(), log_sum.float(), top, top_key)


def exact_backward(problem: Problem, grad: Tensor, log_denominator: Tensor, inner: Tensor) -> Gradients:
    """As `exact_forward`."""
    wide = problem._replace(**{name: getattr(problem, name).double() for name in ("q", "k", "v", "policy")})
    found = blockwise.blockwise().backward(wide, grad.double(), log_denominator.double(), inner.double())
    return Gradients(*(each.float() for each in found))


def test_the_check_at_the_start_does_not_depend_on_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flawless kernels pass with TF32 and without; wrong ones are found with both."""
    monkeypatch.setattr(triton_launch, "forward", exact_forward)
    monkeypatch.setattr(triton_launch, "backward", exact_backward)
    check = triton_launch._check_once.__wrapped__
    arguments = (torch.device("cpu"), torch.float32, 64)
    product = torch.ones(4, 4) * 1.0001
    check(*arguments)
    with Tf32():
        assert float((product @ product)[0, 0]) == 4.0, "the mode must do something"
        check(*arguments)

    def wrong(problem: Problem, want_top: bool) -> Forward:
        found = exact_forward(problem, want_top)
        return found._replace(output=found.output * 1.001)

    monkeypatch.setattr(triton_launch, "forward", wrong)
    for mode in (contextlib.nullcontext(), Tf32()):
        with mode, pytest.raises(RuntimeError, match="output differs by"):
            check(*arguments)
