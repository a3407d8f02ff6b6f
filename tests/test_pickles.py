"""No pickle runs anywhere: each kind of file that a program may unpickle holds a bomb, and is refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hydralora.finetune
import llava.train.train
import mma.lavin.convert
import mma.lavin.weights.__main__
from dynamic.original import CONFIG_KEY
from hydralora.tuner.original import import_adapter
from llava.convert.__main__ import main as convert
from llava.errors import CheckpointError, LlavaError
from llava.model.builder import load_pretrained_model
from llava.runtime.tokenizer import load_tokenizer
from llava.runtime.weights.torch_files import (
    NEVER_READ,
    TAG_FILES,
    check_training_state,
    deepspeed_classes,
    load_plain,
    random_state_classes,
    torch_files,
)
from tests.bombs import CONTAINERS, Bomb, inside
from tests.golden import golden_dir
from tests.hydralora.text import test_finetune as text
from tests.llava.train.test_training import BASE, LLAVA, command_line

MOHLE = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"


pytest.importorskip("deepspeed", reason="the extra 'train' is not installed")

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine  # noqa: E402


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


# Program: what makes its inputs in a folder and says which file is to hold the bomb, and what then runs it.
Case = Callable[[Path], tuple[Path, Callable[[], Any]]]


def base_of_training(folder: Path) -> tuple[Path, Callable[[], Any]]:
    base = copied(BASE, folder / "base")
    return base / "pytorch_model-00002-of-00002.bin", lambda: llava.train.train.main(
        command_line(folder / "out", model_name_or_path=base)
    )


def single_base_of_training(folder: Path) -> tuple[Path, Callable[[], Any]]:
    base = copied(LLAVA / "tiny-vicuna", folder / "base")
    for path in base.glob("*.safetensors*"):
        path.unlink()
    return base / "pytorch_model.bin", lambda: llava.train.train.main(
        command_line(folder / "out", model_name_or_path=base, tune_mm_mlp_adapter=True)
    )


def tower_of_training(folder: Path) -> tuple[Path, Callable[[], Any]]:
    tower = copied(LLAVA / "tiny-clip", folder / "tower")
    return tower / "pytorch_model.bin", lambda: llava.train.train.main(command_line(folder / "out", vision_tower=tower))


def open_clip_of_training(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "weights.pt"
    pytest.importorskip("open_clip", reason="the extra 'openclip' is not installed")
    name = f"open_clip:ViT-B-32/{path}"
    return path, lambda: llava.train.train.main(command_line(folder / "out", vision_tower=name))


def projector_of_training(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "mm_projector.bin"
    options = {"model_name_or_path": LLAVA / "tiny-vicuna", "pretrain_mm_mlp_adapter": path}
    return path, lambda: llava.train.train.main(command_line(folder / "out", tune_mm_mlp_adapter=True, **options))


def checkpoint_file(source: Path, name: str, base: Path | None = None) -> Case:
    def case(folder: Path) -> tuple[Path, Callable[[], Any]]:
        checkpoint = copied(source, folder / "checkpoint")
        return checkpoint / name, lambda: load_pretrained_model(
            str(checkpoint), None if base is None else str(base), device="cpu"
        )

    return case


def adapter_of_evaluation(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path, run = checkpoint_file(LLAVA / "tiny-llava-lora", "adapter_model.bin", BASE)(folder)
    path.with_suffix(".safetensors").unlink()
    return path, run


def meta_weights(folder: Path) -> tuple[Path, Callable[[], Any]]:
    (folder / "7B").mkdir()
    (folder / "7B" / "params.json").write_text(json.dumps({"dim": 8, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-5}))
    words = ["--llama_model_path", str(folder), "--llm_model", "7B"]
    return folder / "7B" / "consolidated.00.pth", lambda: mma.lavin.weights.__main__.main(words)


def lavin_adapters(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "lavin.pth"
    words = ["import", str(path), str(folder / "ours"), "--base", str(LLAVA / "tiny-vicuna")]
    return path, lambda: mma.lavin.convert.main(words)


def text_base(folder: Path) -> tuple[Path, Callable[[], Any]]:
    base = text.save_base(folder / "base")
    (base / "model.safetensors").unlink()
    text.save_data(folder / "data")
    return base / "pytorch_model.bin", lambda: hydralora.finetune.main(text.command_line(folder, folder / "out"))


def text_adapter(folder: Path) -> tuple[Path, Callable[[], Any]]:
    text.save_base(folder / "base")
    text.save_data(folder / "data")
    start = text.save_start(folder / "start")
    words = text.command_line(folder, folder / "out", peft_path=start)
    return start / "adapter_model.bin", lambda: hydralora.finetune.main(words)


def text_adapter_of_peft(folder: Path) -> tuple[Path, Callable[[], Any]]:
    text.save_base(folder / "base")
    text.save_data(folder / "data")
    import_adapter(text.save_start(folder / "start"), folder / "ours")
    (folder / "ours" / "adapter_model.safetensors").unlink()
    words = text.command_line(folder, folder / "out", peft_path=folder / "ours")
    return folder / "ours" / "adapter_model.bin", lambda: hydralora.finetune.main(words)


def original_adapter(folder: Path) -> tuple[Path, Callable[[], Any]]:
    start = text.save_start(folder / "start")
    return start / "adapter_model.bin", lambda: import_adapter(start, folder / "ours")


def sparse_folder(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path, run = checkpoint_file(BASE, "pytorch_model-00001-of-00002.bin")(folder)
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps(config | {CONFIG_KEY: {"sparse_layer": 1}}))
    return path, run


def hf_folder(folder: Path) -> tuple[Path, Callable[[], Any]]:
    convert(["to-hf", str(BASE), str(folder / "hf")])
    for path in (folder / "hf").glob("*.safetensors*"):
        path.unlink()
    words = ["from-hf", str(folder / "hf"), str(folder / "ours")]
    return folder / "hf" / "pytorch_model.bin", lambda: convert(words)


def tokenizer(name: str) -> Case:
    def case(folder: Path) -> tuple[Path, Callable[[], Any]]:
        return folder / name, lambda: load_tokenizer(folder)

    return case


def data_file(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "data.json"
    return path, lambda: llava.train.train.main(command_line(folder / "out", data_path=path))


CASES: dict[str, Case] = {
    "training, base in shards": base_of_training,
    "training, base": single_base_of_training,
    "training, tower": tower_of_training,
    "training, tower of open_clip": open_clip_of_training,
    "training, projector": projector_of_training,
    "evaluation, weights": checkpoint_file(BASE, "pytorch_model-00001-of-00002.bin"),
    "evaluation, LoRA": adapter_of_evaluation,
    "evaluation, weights next to LoRA": checkpoint_file(LLAVA / "tiny-llava-lora", "non_lora_trainables.bin", BASE),
    "evaluation, projector": checkpoint_file(LLAVA / "tiny-llava-pretrain", "mm_projector.bin", LLAVA / "tiny-vicuna"),
    "evaluation, experts": checkpoint_file(MOHLE, "non_lora_trainables.bin", BASE),
    "evaluation, predictors": sparse_folder,
    "LaVIN, Meta's weights": meta_weights,
    "LaVIN, adapters": lavin_adapters,
    "text, base": text_base,
    "text, adapter of the original": text_adapter,
    "text, adapter of PEFT": text_adapter_of_peft,
    "text, conversion": original_adapter,
    "conversion, transformers' format": hf_folder,
}

OTHERS: dict[str, Case] = {
    "training, data": data_file,
    "tokenizer.model": tokenizer("tokenizer.model"),
    "tokenizer.json": tokenizer("tokenizer.json"),
}
"""Files of formats that no library here unpickles."""


@pytest.mark.parametrize("name", CASES)
def test_no_program_runs_a_pickle(name: str, tmp_path: Path) -> None:
    """The message names the file, and does not advise to load it in another way, as torch's own does."""
    path, run = CASES[name](tmp_path)
    path.write_bytes(CONTAINERS["zip"](inside(tmp_path / "marker")))
    with pytest.raises((LlavaError, ValueError)) as caught:
        run()
    assert not (tmp_path / "marker").exists()
    assert path.name in str(caught.value), caught.value
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("container", CONTAINERS)
def test_no_container_is_unpickled(container: str, tmp_path: Path) -> None:
    """Nor is one whose bomb lies behind a million values, or one that asks for another module of an allowed name."""
    marker, path = tmp_path / "marker", tmp_path / "weights.bin"
    for content in (Bomb(marker), inside(marker), [list(range(1000)), {"a": {"b": [Bomb(marker)]}}], (Bomb(marker),)):
        path.write_bytes(CONTAINERS[container](content))
        for mapped in (False, True):
            with pytest.raises(CheckpointError, match=r"weights\.bin"):
                load_plain(path, random_state_classes(), mapped=mapped)
        assert not marker.exists()


@pytest.mark.parametrize("container", ["zip", "old", "bare"])
def test_the_bombs_are_live(container: str, tmp_path: Path) -> None:
    """What the tests above are worth: an unpickler without restrictions runs them."""
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTAINERS[container](inside(tmp_path / "marker")))
    if container == "bare":
        pickle.loads(path.read_bytes())["state"]["code"].close()  # noqa: S301 - the attack is our own
    else:
        TorchCheckpointEngine().load(str(path))["state"]["code"].close()
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_torch_file_is_not_unpickled_either(name: str, tmp_path: Path) -> None:
    path, run = OTHERS[name](tmp_path)
    for container in CONTAINERS.values():
        path.write_bytes(container(inside(tmp_path / "marker")))
        with pytest.raises(Exception):  # noqa: B017,PT011 - whose it is, is the business of other tests
            run()
        assert not (tmp_path / "marker").exists()


# Resuming


TRAINER_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth", "pytorch_model.bin")
DEEPSPEED_FILES = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "layer_00_expert_0_mp_rank_00_model_states.pt",
    "zero/model.norm.weight/fp32.pt",
    "zero/optimizer_state.pt",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each trainer, with a checkpoint at update 2 of 3."""
    folder = tmp_path_factory.mktemp("runs")
    text.save_base(folder / "base")
    text.save_data(folder / "data")
    hydralora.finetune.main(text.command_line(folder, folder / "text", max_steps=3))
    llava.train.train.main(command_line(folder / "llava", tune_mm_mlp_adapter=True))
    return folder


def resume_command(runs: Path, program: str, output: Path) -> tuple[Callable[[list[str]], Any], list[str]]:
    shutil.copytree(runs / program / "checkpoint-2", output / "checkpoint-2")
    if program == "text":
        return hydralora.finetune.main, text.command_line(runs, output, max_steps=3)
    return llava.train.train.main, command_line(output, tune_mm_mlp_adapter=True)


@pytest.mark.parametrize("program", ["llava", "text"])
@pytest.mark.parametrize("name", TRAINER_FILES)
def test_a_run_is_not_resumed_from_a_bomb(program: str, name: str, runs: Path, tmp_path: Path) -> None:
    main, words = resume_command(runs, program, tmp_path / "out")
    bomb = tmp_path / "out" / "checkpoint-2" / name
    bomb.write_bytes(CONTAINERS["zip"](inside(tmp_path / "marker")))
    with pytest.raises(CheckpointError, match=name) as caught:
        main(words)
    assert "io.open" in str(caught.value), "what it asks for is named"
    assert not (tmp_path / "marker").exists()
    assert bomb.exists(), "nothing is deleted"


@pytest.mark.parametrize("program", ["llava", "text"])
def test_what_nobody_opens_may_hold_anything(program: str, runs: Path, tmp_path: Path) -> None:
    main, words = resume_command(runs, program, tmp_path / "out")
    assert {"training_args.bin"} == set(NEVER_READ)
    (tmp_path / "out" / "checkpoint-2" / "training_args.bin").write_bytes(CONTAINERS["zip"](Bomb(tmp_path / "marker")))
    main(words)
    assert (tmp_path / "out" / "trainer_state.json").is_file()
    assert not (tmp_path / "marker").exists()


def deepspeed_checkpoint(folder: Path) -> Path:
    """What DeepSpeed's files are made of; real ones are resumed in `tests/llava/train/test_deepspeed.py`."""
    enumeration, address, scale, dynamic = deepspeed_classes()
    step = folder / "global_step2"
    content = {
        "module": {"weight": torch.ones(2)},
        "optimizer_state_dict": {
            "zero_stage": enumeration(2),
            "param_slice_mappings": [{"weight": address(numel=2, start=0)}],
            "loss_scaler": [scale(scale=1), dynamic(2.0**16, 1000, 1, 2, False)],
        },
        "ds_config": {"fp16": {"enabled": False}},
        "param_shapes": [{"weight": torch.Size([2])}],
    }
    for name in DEEPSPEED_FILES:
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, step / name)
    (folder / "latest").write_text("global_step2")
    return folder


@pytest.mark.parametrize("name", DEEPSPEED_FILES)
def test_deepspeed_opens_no_bomb(name: str, tmp_path: Path) -> None:
    """Each of its files, by each container, in the folder itself or behind a link."""
    folder = deepspeed_checkpoint(tmp_path / "checkpoint-2")
    check_training_state(folder, deepspeed=True)
    for container in CONTAINERS.values():
        (folder / "global_step2" / name).write_bytes(container(inside(tmp_path / "marker")))
        with pytest.raises(CheckpointError, match=Path(name).name):
            check_training_state(folder, deepspeed=True)
    (folder / "global_step2").rename(tmp_path / "elsewhere")
    (folder / "global_step2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=Path(name).name):
        check_training_state(folder, deepspeed=True)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "..", "", "global_step3", "*", "global_step2/../../elsewhere"])
@pytest.mark.parametrize("file", TAG_FILES)
def test_deepspeed_looks_nowhere_else(file: str, tag: str, tmp_path: Path) -> None:
    folder = deepspeed_checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "elsewhere").mkdir()
    (folder / file).write_text(tag)
    with pytest.raises(CheckpointError, match=f"{file}: names"):
        check_training_state(folder, deepspeed=True)


def test_deepspeeds_classes_are_let_in_for_deepspeed_alone(tmp_path: Path) -> None:
    folder = deepspeed_checkpoint(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="deepspeed"):
        check_training_state(folder, deepspeed=False)
    (folder / "latest").unlink()
    with pytest.raises(CheckpointError, match="no file 'latest'"):
        check_training_state(folder, deepspeed=True)
    (folder / "global_step2" / "again").symlink_to(folder)  # a circle of links ends
    assert len(list(torch_files(folder))) == len(DEEPSPEED_FILES)
