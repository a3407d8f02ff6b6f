"""Runs the Triton kernels in Triton's interpreter on the CPU and prints their errors as JSON.

A program of its own, because `TRITON_INTERPRET=1` must be set before triton is imported. For every case of the table it
prints the relative errors, against float64, of the kernels and of the straightforward formula in the same dtype.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import triton
from triton.runtime import interpreter

from tests.dynamic.attention.attention_cases import CASES, draw, relative_errors, run

RUNS = {
    "hard": (torch.float32, 0.0),
    "dominated": (torch.float32, 0.003),
    "bidirectional_padded": (torch.float32, 0.003),
    "left_padding": (torch.float32, 0.0),
    "grouped": (torch.float16, 0.0),
    "right_padding": (torch.bfloat16, 0.0),
}
"""Case, dtype and eps of each run: together they take every branch of the kernels."""


def _mend_interpreter() -> None:
    """Let loops have bounds from arguments: numpy 2.4 makes no number of an array of one number any more.

    Mended in triton after 3.6 (triton-lang/triton pull request 9172).
    """
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


def _multiply_bfloat16() -> None:
    """Let products take bfloat16 factors: numpy has no such type, the interpreter keeps their bits as integers."""
    product = interpreter.InterpreterBuilder.create_dot

    def widened(factor: Any) -> Any:
        if factor.dtype.scalar != triton.language.bfloat16:
            return factor
        bits = factor.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), triton.language.float32)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(builder, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def main() -> None:
    """Print `{case: {tensor: [error of the kernels, error of eager]}}`."""
    _mend_interpreter()
    _multiply_bfloat16()
    report = {}
    for name, (dtype, eps) in RUNS.items():
        tensors, arguments = draw(CASES[name], dtype)
        doubles = {key: value.detach().double().requires_grad_() for key, value in tensors.items()}
        exact = run(doubles, implementation="eager", eps=eps, **arguments)
        with torch.autocast("cpu", torch.bfloat16):  # must not reach inside
            found = run(tensors, implementation="triton", eps=eps, **arguments)
        kernels = relative_errors(found, exact)
        eager = relative_errors(run(tensors, implementation="eager", eps=eps, **arguments), exact)
        report[name] = {key: [kernels[key], eager[key]] for key in exact}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
