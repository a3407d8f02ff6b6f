"""Two processes in the patched checkout, as its users launch it: torch's data parallelism, ZeRO-2 and ZeRO-3.

On a CPU by gloo, in fp32, since gloo knows no bf16 in torch 2.1; no gradient is clipped. `upstream_checkout.py` says
what these tests need.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.moe_patch.upstream_checkout import (
    HERE,
    MODALITIES,
    NEEDS_UPSTREAM,
    ROOT,
    SPARSE,
    TRAIN,
    Upstream,
    answers,
    losses_of,
    our_answers,
    our_logits,
    weights_of,
)

pytestmark = NEEDS_UPSTREAM


@dataclass(frozen=True)
class Method:
    """A command line, and beginnings or endings of the names of weights that it must have moved."""

    flags: str
    moved: tuple[str, ...]


METHODS = {
    "hydralora": Method(TRAIN, (".lora_B.", ".moe_gate.", ".router.", "mm_projector.")),
    "mma": Method(
        MODALITIES.replace("--save_strategy no", "--save_strategy steps --save_steps 2"),
        (".conv_", ".expert_weights.", "mm_projector."),
    ),
    "dynamic": Method(
        SPARSE,
        ("image_score_predictor.", "text_score_predictor.", "instruct_score_predictor.", "lm_head.", "mm_projector."),
    ),
}
LAUNCHES = ("ddp", "zero2", "zero3")
Runs = dict[tuple[str, str], list[float]]


@pytest.fixture(scope="module")
def applied(upstream: Upstream) -> Upstream:
    script, names = str(ROOT / "moe_patch" / "patch.sh"), ",".join(METHODS)
    upstream.run("moe_patch/patch.sh LLaVA --extensions ...", script, str(upstream.checkout), "--extensions", names)
    return upstream


def run(checkout: Upstream, method: str, launch: str, output: str) -> list[float]:
    """The losses of a run of three updates; a folder with a checkpoint is resumed. No gradient is clipped."""
    words = METHODS[method].flags.replace("--bf16 True", "").replace("--no_cuda True", "").split()
    settings = {"--output_dir": f"./{output}", "--gradient_accumulation_steps": "1"}
    for name, value in settings.items():
        if name in words:
            words[words.index(name) + 1] = value
    words += ["--max_grad_norm", "0", "--per_device_train_batch_size", "1"]
    words += ["--adapter_dropout", "0"] if method == "mma" else []
    words += ["--lora_dropout", "0"] if method == "hydralora" else []
    if launch == "zero3" and "--pretrain_mm_mlp_adapter" in words:
        # Upstream copies this file into a projector of the base that is split by then; it is that of the base.
        place = words.index("--pretrain_mm_mlp_adapter")
        del words[place : place + 2]
    if launch == "ddp":
        device, extra = "--fp32-tower", ["--no_cuda", "True", "--ddp_backend", "gloo"]
    else:
        device, extra = "--deepspeed-on-cpu", ["--deepspeed", str(checkout.checkout / "scripts" / f"{launch}.json")]
    given = "" if launch == "ddp" else f"--deepspeed scripts/{launch}.json "
    title = f"torchrun --nproc_per_node 2 ... train.py {words[0]} True {given}--output_dir ./{output} ..."
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "in_checkout.py"))
    own = os.environ.get("LLAVA_UPSTREAM_FLAGS", "").split()
    program = (device, "--start-alike", "run", "llava.train.train", *words, *extra, *own)
    return losses_of(checkout.program(title, *launcher, *program))


@pytest.fixture(scope="module")
def runs(applied: Upstream) -> Runs:
    """The losses of the runs so far."""
    return {}


def losses(runs: Runs, applied: Upstream, method: str, launch: str) -> list[float]:
    """Of a whole run, made when it is first asked for."""
    versions = applied.log[0]
    if "transformers 4.37" not in versions and (method == "dynamic" or launch != "ddp"):
        pytest.skip("tried with the versions of c121f04 alone")
    if "torch 2.0" in versions and method == "mma":
        pytest.skip("--mma needs torch 2.1")
    if (method, launch) not in runs:
        runs[method, launch] = run(applied, method, launch, f"{method}-{launch}")
    return runs[method, launch]


def unmoved(found: dict[str, Tensor], middle: dict[str, Tensor], parts: tuple[str, ...]) -> list[str]:
    """Those of `parts` of which no weight differs between two states of a run."""
    both = [name for name in found if name in middle]
    return [part for part in parts if not any(part in n and not middle[n].equal(found[n]) for n in both)]


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_the_result_is_the_same_to_both(applied: Upstream, runs: Runs, method: str, launch: str) -> None:
    """Finite losses and weights, and both sides read the result alike; the stages of DeepSpeed have the same losses.

    Torch has them up to the first update: DeepSpeed's optimizers count a step of zeros, which its own start makes.
    """
    found = losses(runs, applied, method, launch)
    assert len(found) == 3
    assert found[0] == pytest.approx(losses(runs, applied, method, "ddp")[0], abs=2e-4)
    if launch == "zero3":
        assert found == pytest.approx(losses(runs, applied, method, "zero2"), abs=2e-4)
    folder = f"{method}-{launch}"
    weights_of(applied.work / folder)
    logits, blocks = applied.logits(folder)
    assert blocks == (3 if method == "hydralora" else 0)
    applied.close("the same checkpoint in llava-extensions", logits, our_logits(applied, folder))
    assert answers(applied, folder) == our_answers(applied, folder)


@pytest.mark.parametrize("launch", LAUNCHES[1:])
@pytest.mark.parametrize("method", METHODS)
def test_it_resumes_under_deepspeed(applied: Upstream, runs: Runs, method: str, launch: str) -> None:
    """By upstream's own code in the middle of the epoch, to exactly the same weights; every part was trained."""
    expected = losses(runs, applied, method, launch)
    whole, resumed = applied.work / f"{method}-{launch}", applied.work / f"{method}-{launch}-resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    assert run(applied, method, launch, resumed.name) == expected[2:]
    found, again = weights_of(whole), weights_of(resumed)
    assert found.keys() == again.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0, msg=name)
    parts = METHODS[method].moved
    assert [part for part in parts if not any(part in name for name in found)] == []
    assert unmoved(found, weights_of(whole / "checkpoint-2"), parts) == []
