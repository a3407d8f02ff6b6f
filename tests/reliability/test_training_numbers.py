"""A loss, a gradient or a weight that is not a number ends a run of every training program, and is never saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback

from hydralora.finetune import main as finetune
from llava.errors import BadImageError, BadSampleError, FlagError, TrainingError
from llava.runtime.failure import good_batches
from llava.train.train import build_run, main, parse_args
from playground.tiny import TinyFolders
from tests.llava.train.test_training import HYDRA, command_line
from tests.mma.lavin.lavin_files import LavinFiles, save_lavin_files, train_tiny
from tests.reliability.overflowing import overflow_in_float16

BROKEN_AT = 2
"""Updates that are made before something breaks."""


@pytest.fixture(scope="module")
def lavin(tmp_path_factory: pytest.TempPathFactory) -> LavinFiles:
    return save_lavin_files(tmp_path_factory.mktemp("lavin"))


def finetune_words(base: Path, folder: Path, output: Path, **changes: Any) -> list[str]:
    """A run of `hydralora.finetune` on 16 equal records."""
    folder.mkdir(exist_ok=True)
    record = {"instruction": "what colour is the small circle ?", "input": "", "output": "red"}
    (folder / "train.json").write_text(json.dumps([record] * 16))
    options = {
        "model_name_or_path": base,
        "dataset_dir": folder,
        "output_dir": output,
        "do_train": True,
        "max_steps": 4,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "max_seq_length": 64,
        "trainable": "q_proj,v_proj",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return [word for name, value in (options | changes).items() for word in (f"--{name}", str(value))]


@pytest.fixture
def programs(lavin: LavinFiles, tiny_folders: TinyFolders, tmp_path: Path) -> dict[str, Callable[[Path], Any]]:
    """Each training program as a run of four updates with a checkpoint after each."""
    llava = HYDRA | {"max_steps": 4, "save_steps": 1}
    saving = ("--save_strategy", "steps", "--save_steps", "1")
    return {
        "llava": lambda output: main(command_line(output, **llava)),
        "hydralora.finetune": lambda output: finetune(
            finetune_words(tiny_folders.language_model, tmp_path / "data", output)
        ),
        "mma": lambda output: train_tiny(lavin, output, *saving),
    }


class _SpoilsWeights(TrainerCallback):
    """Writes NaN into a trained weight after the update that follows `BROKEN_AT`, before it is saved."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == BROKEN_AT + 1:
            _trained(kwargs["model"]).data[..., 0] = float("nan")


def _trained(model: torch.nn.Module) -> torch.nn.Parameter:
    return [weight for weight in model.parameters() if weight.requires_grad][-1]


def spoil(what: str, patch: pytest.MonkeyPatch) -> None:
    """Break a run of any program after `BROKEN_AT` updates, below everything of ours."""
    step = transformers.Trainer.training_step

    def broken(self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step != BROKEN_AT:
            return step(self, model, *args, **kwargs)
        if what == "loss":
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.data.fill_(float("inf"))
        if what == "weights":
            self.add_callback(_SpoilsWeights())
        loss = step(self, model, *args, **kwargs)
        if what == "gradient norm":
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            gradients[0].flatten()[0] = float("nan")
        return loss

    patch.setattr(transformers.Trainer, "training_step", broken)


MESSAGES = {
    "loss": r"the loss is (nan|inf) at update 3 of 4",
    "gradient norm": r"the gradient norm is nan at update 3 of 4",
    "weights": r"1 of \d+ trained tensors hold NaN or infinite values after update 3 of 4",
}


@pytest.mark.parametrize("what", MESSAGES)
@pytest.mark.parametrize("program", ["llava", "hydralora.finetune", "mma"])
def test_what_is_no_number_ends_the_run(
    program: str,
    what: str,
    programs: dict[str, Callable[[Path], Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        spoil(what, patch)
        with pytest.raises(TrainingError, match=MESSAGES[what] + r".*last checkpoint is whole: .*checkpoint-2"):
            programs[program](output)
    assert sorted(path.name for path in output.glob("*-*")) == ["checkpoint-1", "checkpoint-2"]
    files = list(output.rglob("*.safetensors"))
    assert files
    assert all(bool(torch.isfinite(value).all()) for path in files for value in load_file(path).values())
    programs[program](output)  # negative control: nothing else is wrong with the run, and the same command ends it
    assert (output / "checkpoint-4").is_dir()


def test_fine_tuning_on_a_base_that_overflows(tiny_folders: TinyFolders, tmp_path: Path) -> None:
    base = overflow_in_float16(tiny_folders.language_model, tmp_path / "base")
    words = finetune_words(base, tmp_path / "data", tmp_path / "half", torch_dtype="float16")
    with pytest.raises(TrainingError, match=r"update 1 of 4.*--torch_dtype bfloat16.*There is no checkpoint yet"):
        finetune(words)
    assert not list((tmp_path / "half").rglob("*.safetensors"))
    finetune(finetune_words(base, tmp_path / "data", tmp_path / "brain", torch_dtype="bfloat16"))


def test_an_evaluation_without_a_loss_is_an_error(tiny_folders: TinyFolders, tmp_path: Path) -> None:
    base = overflow_in_float16(tiny_folders.language_model, tmp_path / "base")
    words = {"do_train": False, "do_eval": True, "validation_file": tmp_path / "data" / "train.json"}
    for dtype in ("float16", "float32"):
        given = finetune_words(base, tmp_path / "data", tmp_path / dtype, torch_dtype=dtype, **words)
        if dtype == "float32":
            finetune(given)
        else:
            with pytest.raises(TrainingError, match=r"evaluation data \(eval_loss\) is nan.*--torch_dtype bfloat16"):
                finetune(given)
        assert (tmp_path / dtype / "eval_results.json").is_file() == (dtype == "float32")


@pytest.mark.parametrize(("scale", "stops"), [(65536.0, False), (2.0, False), (1.0, True), (0.5, True)])
def test_overflow_is_searched_for_down_to_no_scale(scale: float, stops: bool, tmp_path: Path) -> None:
    """With fp16, gradients overflow until the scale of the loss fits; without any scale left it is no such search."""
    trainer = build_run(parse_args(command_line(tmp_path, **HYDRA))).trainer
    trainer.args.fp16 = True
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: scale)
    norm = torch.tensor(float("inf"))
    if stops:
        with pytest.raises(TrainingError, match=r"gradient norm is inf.*--bf16 True"):
            trainer._get_grad_norm(trainer.model, norm)
    else:
        assert trainer._get_grad_norm(trainer.model, norm) is norm


def bad_rows() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    """A row of each kind that cannot be trained on, the class of its error, and what it says."""
    said = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A dog."}]
    return {
        "no such image": ({"image": "absent.png", "conversations": said}, BadImageError, r"absent\.png"),
        "too many images": ({"image": ["im0.png", "im1.png"], "conversations": said}, BadSampleError, r"2 image"),
        "image is a number": ({"image": 5, "conversations": said}, BadSampleError, r"'image' must be a file name"),
        "no turns": ({"conversations": 5}, BadSampleError, r"'conversations' must be a list"),
        "no answer": ({"conversations": [{"from": "human", "value": "What?"}]}, BadSampleError, r"row 3"),
    }


def write_rows(bad: dict[str, Any], path: Path) -> Path:
    """Good rows of text with a bad one as row 3."""
    said = [{"from": "human", "value": "What is a lake?"}, {"from": "gpt", "value": "Water."}]
    rows = [{"id": f"good{number}", "conversations": said} for number in range(8)]
    rows[3] = {"id": "bad"} | bad
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", bad_rows())
def test_a_bad_sample_is_one_line(name: str, workers: int, tmp_path: Path) -> None:
    """The same text from a worker process as from this one: file, row, and nothing of a traceback."""
    bad, kind, text = bad_rows()[name]
    data = write_rows(bad, tmp_path / "data.json")
    words = command_line(tmp_path / "out", **HYDRA, data_path=data, dataloader_num_workers=workers, max_steps=8)
    with pytest.raises(kind, match=text) as raised:
        main(words)
    assert re.search(r"data\.json, row 3", str(raised.value))
    assert len(str(raised.value).splitlines()) == 1
    assert "worker" not in str(raised.value)


UNREADABLE = {
    "image is a number": {"image": 5, "conversations": [{"from": "human", "value": "What?"}]},
    "no turns": {"conversations": 5},
    "a turn is a word": {"conversations": ["What?"]},
    "a value is null": {"conversations": [{"from": "human", "value": None}]},
    "no conversation": {},
    "no words": {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "  "}]},
}


@pytest.mark.parametrize("bad", UNREADABLE.values(), ids=UNREADABLE)
def test_grouping_by_modality_names_file_and_row(bad: dict[str, Any], tmp_path: Path) -> None:
    data = write_rows(bad, tmp_path / "data.json")
    words = command_line(tmp_path / "out", **HYDRA, data_path=data, group_by_modality_length=True)
    with pytest.raises((BadSampleError, FlagError), match=r"data\.json, row 3"):
        main(words)


def test_good_batches_pass_as_they_are() -> None:
    batches = [{"input_ids": 1}, {"input_ids": 2}]
    assert all(a is b for a, b in zip(good_batches(batches), batches, strict=True))


def test_without_the_bad_row_the_same_command_trains(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "What is a lake?"}, {"from": "gpt", "value": "Water."}]
    data = write_rows({"conversations": said}, tmp_path / "data.json")
    main(command_line(tmp_path / "out", **HYDRA, data_path=data, dataloader_num_workers=1, max_steps=4))
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
