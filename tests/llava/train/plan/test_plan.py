"""The plan of a run: bytes against those of a real run on the CPU, shares of DeepSpeed, the search, the command."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import FlagError
from llava.runtime.rehearsal.memory import MemoryMeter, Part
from llava.train.evaluation.rows import NoRows
from llava.train.plan.__main__ import main
from llava.train.plan.command import read_command
from llava.train.plan.plan import GIB, largest_batch, make_plan, outside
from llava.train.plan.rows import planned_rows
from llava.train.plan.shares import share_of
from llava.train.plan.update import Rehearsal, Update, measure
from llava.train.train import Parts, build_run
from playground.tiny import Sizes, build_tiny

LENGTH, BATCH = 256, 4
LORA = "--lora_enable True --lora_r 8"
METHODS = {
    "full": "--gradient_checkpointing True",
    "lora": LORA,
    "hydralora": "--use_lora True --lora_rank 4 --llm_moe_num_experts 3 --gradient_checkpointing True",
    "qlora": f"{LORA} --bits 4",
    "dynamic": "--dynamic True --sparse_layer 1",
    "mma": "--mma True --visual_input llava",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a tower whose activations outweigh what is small and not counted."""
    root = tmp_path_factory.mktemp("planned")
    build_tiny(root, sizes=Sizes(width=256, mlp_width=512, layers=2, heads=4))
    (root / "rows.json").write_text("[]", encoding="utf-8")
    return root


def words(folder: Path, options: str = "") -> list[str]:
    common = (
        f"--model_name_or_path {folder}/tiny-vicuna --version v1 --data_path {folder}/rows.json "
        f"--image_folder {folder} --vision_tower {folder}/tiny-clip --mm_projector_type mlp2x_gelu "
        f"--mm_use_im_patch_token False --output_dir {folder}/out --per_device_train_batch_size {BATCH} "
        f"--model_max_length {LENGTH} "
    )
    return (common + options).split()


def really(folder: Path, options: str) -> MemoryMeter:
    """Two updates of the same command with real weights, by the Trainer, under the meter."""
    command = read_command(words(folder, f"{options} --use_cpu True --max_steps 2 --save_strategy no"))
    rows = partial(planned_rows, copies=2 * BATCH)
    run = build_run(command.args, None, Parts(dataset=rows, evaluation_rows=lambda *_: NoRows(), records=False))
    meter = MemoryMeter(torch.device("cpu"), run.model.config.vocab_size)
    try:
        with meter:
            meter.watch(run.model)
            run.trainer.train()
    finally:
        meter.close()
        shutil.rmtree(folder / "out")
    return meter


@pytest.mark.parametrize("method", METHODS)
def test_planned_bytes_are_those_of_a_real_run(method: str, folder: Path) -> None:
    """Within 10 percent, in all and of what stays; nothing of the real run is known to the plan."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    meter = really(folder, METHODS[method])
    planned = measure(read_command(words(folder, f"{METHODS[method]} --use_cpu True")), BATCH)
    assert sum(planned.peak.values()) == pytest.approx(meter.peak_bytes, rel=0.1)
    assert planned.weights == pytest.approx(meter.now[Part.WEIGHTS], rel=0.02)
    assert planned.peak[Part.ACTIVATIONS] > 0


# What is on one GPU

MEASURED = Update(
    passes=900,
    step=850,
    peak={Part.WEIGHTS: 500, Part.GRADIENTS: 100, Part.OPTIMIZER: 200, Part.ACTIVATIONS: 70, Part.LOGITS: 30},
    work={Part.ACTIVATIONS: 80, Part.LOGITS: 40},
    weights=400,
    trained=100,
    state=800,
    flops=1,
    waits={},
    step_waits={},
)
SHARED = {
    # stage: weights, gradients (bf16), optimizer (a float32 copy and Adam's two moments) of one of 4 processes
    0: (400, 200, 1200),
    1: (400, 200, 300),
    2: (400, 50, 300),
    3: (100, 50, 300),
}


@pytest.mark.parametrize("stage", SHARED)
def test_zero_divides_what_its_stage_says(stage: int) -> None:
    share = share_of(MEASURED, 4, {"zero_optimization": {"stage": stage}}, width=2, half_bytes=2)
    kept = tuple(share.parts[part] for part in (Part.WEIGHTS, Part.GRADIENTS, Part.OPTIMIZER))
    assert kept == SHARED[stage]
    assert share.parts[Part.ACTIVATIONS] == 80
    assert share.parts[Part.LOGITS] == 40
    assert (share.buffers > 0) == (stage > 0)


def test_offloaded_states_are_in_the_memory_of_the_machine() -> None:
    settings = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    share = share_of(MEASURED, 4, settings, width=2, half_bytes=2)
    assert share.parts[Part.OPTIMIZER] == 0
    assert share.host == 350


def test_data_parallelism_adds_the_buckets_of_gradients() -> None:
    alone, together = (share_of(MEASURED, gpus, None, width=2, half_bytes=2) for gpus in (1, 2))
    assert alone.total == 900
    assert together.total == 900 + 4 * 100


@pytest.mark.parametrize("start", [1, 4, 64])
@pytest.mark.parametrize("room", [99, 100, 1_234, 10_050])
def test_the_largest_batch_is_found_whatever_the_start(start: int, room: int) -> None:
    def bytes_of(batch: int) -> int:
        return 50 + 50 * batch + batch**2 // 10

    found = largest_batch(bytes_of, start, room)
    assert found == 0 or bytes_of(found) <= room
    assert bytes_of(found + 1) > room


@pytest.mark.parametrize(("room", "largest", "asked"), [(1_080, 20, 3), (1_049, 19, 4)])
def test_few_batches_are_measured_where_bytes_are_in_proportion(room: int, largest: int, asked: int) -> None:
    """Two and what they lead to; the next one only where it is too large by less than a fifth of a row."""
    measured: set[int] = set()

    def bytes_of(batch: int) -> int:
        measured.add(batch)
        return 50 + 50 * batch

    assert largest_batch(bytes_of, 8, room) == largest
    assert len(measured) == asked


def test_the_step_is_measured_apart_from_the_passes(folder: Path) -> None:
    """In full fine-tuning the step is the peak; it does not grow with the batch, and has waits of its own."""
    rehearsal = Rehearsal(read_command(words(folder, "--bf16 True --max_grad_norm 1")))
    whole, passes, larger = rehearsal.measure(1), rehearsal.measure(1, steps=False), rehearsal.measure(2, steps=False)
    assert sum(whole.peak.values()) > whole.passes == passes.passes == sum(passes.peak.values())
    assert larger.passes > passes.passes
    assert whole.waits == passes.waits
    assert passes.step_waits == {}
    assert whole.work == passes.work
    plan = make_plan(read_command(words(folder, "--bf16 True --per_device_train_batch_size 1 --gpu_memory 1.02")))
    assert plan.share.total == sum(whole.peak.values())
    assert plan.largest == 0 or plan.fits


def test_memory_of_an_update_does_not_depend_on_the_states_of_deepspeed(folder: Path) -> None:
    """They are measured once, next to the updates."""
    settings = json.dumps({"zero_optimization": {"stage": 2}}, separators=(",", ":"))
    rehearsal = Rehearsal(read_command([*words(folder, "--bf16 True"), "--deepspeed", settings]))
    first, second = rehearsal.measure(1), rehearsal.measure(1, steps=False)
    assert first.state == second.state == pytest.approx(8 * first.trained, rel=1e-4)  # and the counts of steps
    assert first.work == second.work
    assert first.passes == second.passes
    assert first.step_waits == {}


def test_another_projector_than_the_base_has_is_refused_as_in_training(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder / "tiny-vicuna", base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    tower = json.loads((folder / "tiny-clip" / "config.json").read_text(encoding="utf-8"))
    images = {"mm_projector_type": "linear", "mm_hidden_size": tower["hidden_size"], "image_aspect_ratio": "pad"}
    config |= images | {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    config |= {"mm_vision_tower": str(folder / "tiny-clip"), "use_mm_proj": True, "mm_vision_select_layer": -2}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    given = words(folder)
    given[given.index("--model_name_or_path") + 1] = str(base)
    with pytest.raises(
        FlagError, match="--mm_projector_type is 'mlp2x_gelu', but the base model has a 'linear' projector"
    ):
        measure(read_command(given), 1)
    given[given.index("--mm_projector_type") + 1] = "linear"
    assert measure(read_command(given), 1).passes > 0


# The command


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--gpus 0", "--gpus 0: at least one process"),
        ("--gpu_memory 0", "--gpu_memory 0.0: expected a number"),
        ("--length 0", "--length 0: expected"),
        ("--record plan.txt", "ends in .json"),
        ("--bits 8 --lora_enable True", "--bits 8: the plan supports 16 and 4"),
        ("--deepspeed absent.json", "--deepspeed absent.json: cannot be read"),
        ("--no_such_option 1", "unknown options"),
        ("--fp16 True --bf16 True", "--fp16 True with --bf16 True"),
        ("""--deepspeed {"zero_optimization":null}""", "the stage of zero_optimization is None"),
    ],
)
def test_what_cannot_be_planned_is_refused(extra: str, message: str, folder: Path) -> None:
    with pytest.raises(FlagError, match=message):
        read_command([*words(folder), *extra.split()])


def test_another_program_is_refused(folder: Path) -> None:
    with pytest.raises(FlagError, match="the plan supports the programs train"):
        read_command(["python", "-m", "llava.train.publish", *words(folder)])


def test_a_whole_launch_is_taken_apart(folder: Path) -> None:
    """The launcher says how many processes there are; DeepSpeed's file and float16 need no GPU."""
    settings = folder / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 2}}), encoding="utf-8")
    launch = f"torchrun --nproc_per_node 8 -m llava.train.train_sparse --deepspeed {settings} --fp16 True --tf32 True"
    command = read_command([*launch.split(), *words(folder)])
    assert command.gpus == 8
    assert command.zero == {"zero_optimization": {"stage": 2}}
    assert command.device.type == "cuda"
    assert "dynamic" in command.args.extensions


@pytest.mark.parametrize(
    ("launch", "gpus"),
    [
        ("torchrun --nnodes 2 --nproc_per_node 8 -m llava.train.train_mem", 16),
        ("torchrun --nproc_per_node=8 llava/train/train_mem.py", 8),
        ("torchrun --standalone llava/train/train.py", 1),
        ("deepspeed --num_nodes 2 --num_gpus 4 llava/train/train_mem.py", 8),
        ("accelerate launch --num_processes 16 --num_machines 2 -m llava.train.train_mem", 16),
    ],
)
def test_launchers_say_how_many_processes_there_are(launch: str, gpus: int, folder: Path) -> None:
    assert read_command([*launch.split(), *words(folder)]).gpus == gpus


def test_settings_of_a_launcher_are_refused(folder: Path) -> None:
    launch = "accelerate launch --use_deepspeed --num_processes 8 -m llava.train.train_mem"
    with pytest.raises(FlagError, match="--use_deepspeed: settings of a launcher are not read"):
        read_command([*launch.split(), *words(folder)])


@pytest.mark.parametrize(
    ("options", "half", "device"),
    [
        ("--bf16 True --fp16 False", True, "cuda"),
        ("--fp16 True --bf16 False", True, "cuda"),
        ("--fp16 False", False, "cuda"),
        ("--no_cuda True", False, "cpu"),
        ("--use_cpu yes", False, "cpu"),
    ],
)
def test_values_of_switches_are_read(options: str, half: bool, device: str, folder: Path) -> None:
    command = read_command([*words(folder), *options.split()])
    assert (command.args.training.bf16, command.device.type) == (half, device)
    assert outside(command) == (GIB if device == "cuda" else 0), "a CPU has no context of CUDA"


def test_the_program_shows_and_writes_a_plan_for_a_gpu(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    extra = f"{LORA} --bf16 True --gpu_memory 1.06 --record {tmp_path / 'plan.json'} --output_dir {tmp_path / 'out'}"
    main(words(folder, extra))
    shown = capsys.readouterr().out
    record: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert record["fits"]
    assert record["largest_batch"] >= BATCH
    assert f"largest batch that fits: {record['largest_batch']}" in shown
    for part in Part:
        assert str(part) in shown
    assert record["total"] == sum(record["bytes"].values()) + record["buffers"] < 0.1 * GIB
    assert not (tmp_path / "out").exists()
