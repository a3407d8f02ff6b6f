"""`--torch_compile True`: which layers, and what it cannot be combined with, said before anything is loaded.

What is compiled and why is said in `llava/model/compiled.py`. transformers reads the same options and would let
accelerate wrap the whole model; `LLaVATrainer` leaves that out.
"""

from __future__ import annotations

import os
import shutil
import sys

import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from llava.model.compiled import compile_layers
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.runtime import checkpointing
from llava.train.options import RunArguments
from llava.train.steps import say


def compile_problems(args: RunArguments) -> list[str]:
    """Why the run cannot be compiled, one line each; nothing without the flag."""
    training = args.training
    if not training.torch_compile:
        return []
    problems = []
    if training.deepspeed:
        problems.append(
            "--torch_compile True and --deepspeed: DeepSpeed gathers and casts weights by hooks within the layers that "
            "would be compiled, which is not tested; leave one of them out"
        )
    if training.fsdp:
        problems.append(
            "--torch_compile True and --fsdp: the hooks that gather a layer's weights would be compiled with it, which "
            "is not tested; leave one of them out"
        )
    if training.bits != 16:
        problems.append(
            f"--torch_compile True and --bits {training.bits}: kernels of bitsandbytes within compiled layers are not "
            "tested; leave one of them out"
        )
    if checkpointing.is_checkpointed(training):
        problems += _checkpointing_problems(args)
    if training.torch_compile_backend == "inductor" and training.device.type == "cpu" and shutil.which(_cxx()) is None:
        problems.append(
            f"--torch_compile True: inductor compiles C++ for a CPU, and '{_cxx()}' is not installed; install g++, "
            "name a compiler by the variable CXX, or leave the flag out"
        )
    return problems


def _checkpointing_problems(args: RunArguments) -> list[str]:
    """Checkpointing must be part of a layer's graph: computed again outside, it might take another graph."""
    problems = []
    if checkpointing.asks_for_reentrant(args.training):
        problems.append(
            f"--torch_compile True and --{checkpointing.OPTIONS} with use_reentrant true: torch's compiler supports "
            'the other kind; pass {"use_reentrant": false} or leave the flag out'
        )
    if "__call__" in vars(GradientCheckpointingLayer):
        problems.append(
            f"--torch_compile True and --{checkpointing.SWITCH} True: transformers {transformers.__version__} "
            "checkpoints the call of a layer and not its forward pass, so that a compiled layer would be computed "
            "again by another graph; install transformers 5.23 or later, or leave one of them out"
        )
    return problems


def _cxx() -> str:
    """The compiler that inductor calls."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def compile_model(args: RunArguments, llava: LlavaForCausalLM) -> None:
    """Compile the layers of a model that is otherwise complete, if the options say so."""
    training = args.training
    if not training.torch_compile:
        return
    count = compile_layers(llava, training.torch_compile_backend, training.torch_compile_mode)
    say(args, "compile", f"{count} layers by {training.torch_compile_backend}, when each is first run")
