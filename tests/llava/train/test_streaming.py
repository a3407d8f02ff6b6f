"""Runs on streams: killed and resumed exactly, on one process and on two, and refused where they cannot be."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from llava.data.streams.dataset import StreamedDataset
from llava.errors import BadSampleError, FlagError
from llava.runtime.monitoring.trainer import MonitoredTrainer
from llava.train.train import main, parse_args
from tests.llava.train.launching import launch_runs
from tests.llava.train.test_interruptions import child, equal, kill_me
from tests.llava.train.test_training import HYDRA, LLAVA, command_line, data_with_bad_rows, losses

pytestmark = pytest.mark.versions

ROWS = json.loads((LLAVA / "data" / "finetune.json").read_text())
# Dropout, so that random states count; more rows than a pass has, so that a resumed run starts in a later pass.
STREAM: dict[str, Any] = HYDRA | {
    "streaming": True,
    "shuffle_buffer": 3,
    "lora_dropout": 0.1,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "save_steps": 2,
}


def two_sources(folder: Path) -> list[str]:
    """A JSON list, and Parquet with the images in it."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir(exist_ok=True)
    (folder / "first.json").write_text(json.dumps(ROWS[:3]))
    images = [row for row in ROWS if isinstance(row.get("image"), str)]
    stored = [
        {
            "id": str(row["id"]),
            "image": {"bytes": (LLAVA / "data" / "images" / row["image"]).read_bytes(), "path": None},
            "conversations": row["conversations"],
        }
        for row in images
    ]
    datasets.Dataset.from_list(stored).to_parquet(str(folder / "second.parquet"))
    return [str(folder / "first.json"), f"{folder / 'second.parquet'}@1.5"]


def streaming(output: Path, sources: list[str], **changes: Any) -> list[str]:
    return [*command_line(output, **STREAM | changes), "--data_path", *sources]


def curve(folder: Path) -> list[tuple[float, ...]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"], entry["epoch"]) for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return two_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def whole(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    main(streaming(folder, sources))
    assert len(losses(folder)) == 6
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_exactly(
    workers: int, whole: Path, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the sixth update; the order does not depend on how many processes prepare the data."""
    output = tmp_path / "out"
    command = streaming(output, sources, dataloader_num_workers=workers)
    made = MonitoredTrainer.get_batch_samples

    def killed() -> None:
        def die(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 5:
                kill_me()
            return made(self, *args, **kwargs)

        monkeypatch.setattr(MonitoredTrainer, "get_batch_samples", die)
        main(command)

    assert os.WIFSIGNALED(child(killed, tmp_path / "report"))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    main(command)
    assert curve(output) == curve(whole)
    assert equal(output, whole)


def test_a_resumed_run_that_began_again_would_be_seen(
    whole: Path, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows before the checkpoint are not trained on again, and their images are not opened."""
    opened: list[str] = []
    prepare = StreamedDataset.prepare

    def recorded(self: Any, row: Any, name: str) -> Any:
        opened.append(name)
        return prepare(self, row, name)

    monkeypatch.setattr(StreamedDataset, "prepare", recorded)
    shutil.copytree(whole / "checkpoint-4", tmp_path / "right" / "checkpoint-4")
    main(streaming(tmp_path / "right", sources))
    assert curve(tmp_path / "right") == curve(whole)
    assert len(opened) == 2 * 2 * 2  # updates, micro batches, rows
    monkeypatch.setattr(StreamedDataset, "passed", property(lambda self: 0, lambda self, value: None), raising=False)
    monkeypatch.setattr(transformers.trainer, "skip_first_batches", lambda loader, count: loader)
    shutil.copytree(whole / "checkpoint-4", tmp_path / "wrong" / "checkpoint-4")
    main(streaming(tmp_path / "wrong", sources))
    assert curve(tmp_path / "wrong") != curve(whole)
    assert not equal(tmp_path / "wrong", whole)


def test_seed_buffer_and_kind_of_data_decide(whole: Path, sources: list[str], tmp_path: Path) -> None:
    """Each is refused as a change of the run when it resumes, and makes another run."""
    moved = two_sources(tmp_path / "moved")
    changes: dict[str, tuple[dict[str, Any], list[str], str]] = {
        "seed": ({"seed": 9}, sources, r"--seed: 42 then, 9 now"),
        "buffer": ({"shuffle_buffer": 4}, sources, r"--shuffle_buffer: 3 then, 4 now"),
        "a list": ({"streaming": False, "shuffle_buffer": None}, sources, r"--streaming: True then, False now"),
        "weight": ({}, [sources[0], sources[1].replace("@1.5", "@2")], r"--data_path"),
        "order": ({}, sources[::-1], r"--data_path"),
    }
    for name, (options, names, message) in changes.items():
        output = tmp_path / name
        shutil.copytree(whole, output)
        command = streaming(output, names, **options)
        if options.get("shuffle_buffer", 0) is None:
            place = command.index("--shuffle_buffer")
            del command[place : place + 2]
        with pytest.raises(FlagError, match=message):
            main(command)
    # The same content elsewhere is the same source; other content is not.
    shutil.copytree(whole / "checkpoint-4", tmp_path / "elsewhere" / "checkpoint-4")
    main(streaming(tmp_path / "elsewhere", moved))
    assert curve(tmp_path / "elsewhere") == curve(whole)
    Path(moved[0]).write_text(json.dumps(ROWS[:2]))
    shutil.copytree(whole / "checkpoint-4", tmp_path / "changed" / "checkpoint-4")
    with pytest.raises(FlagError, match=r"--data_path"):
        main(streaming(tmp_path / "changed", moved))


@pytest.mark.slow
def test_two_processes(sources: list[str], whole: Path, tmp_path: Path) -> None:
    """Rows of each process are its own, a resume is exact, and no process waits for one whose rows are fewer."""
    one, part, more = tmp_path / "one", tmp_path / "part", {"ddp_backend": "gloo", "dataloader_num_workers": 2}
    runs = [
        {"arguments": streaming(one, sources, **more)},
        {
            "copy": [str(one / "checkpoint-2"), str(part / "checkpoint-2")],
            "arguments": streaming(part, sources, **more),
        },
    ]
    launch_runs(2, runs, tmp_path)
    assert len(curve(one)) == 6
    assert curve(part) == curve(one) != curve(whole)
    assert equal(part, one)
    shutil.copytree(one / "checkpoint-2", tmp_path / "alone" / "checkpoint-2")
    same_batch = {"per_device_train_batch_size": 4}
    with pytest.raises(FlagError, match="processes that share the stream: 2 then, 1 now"):
        main(streaming(tmp_path / "alone", sources, **same_batch))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no end": ({"max_steps": -1}, "say by --max_steps when the run ends"),
    "negative buffer": ({"shuffle_buffer": -1}, "--shuffle_buffer -1: must be at least 0"),
    "by modality": ({"group_by_modality_length": True}, "--group_by_modality_length and --streaming True"),
    "by length": ({"train_sampling_strategy": "group_by_length"}, "group_by_length and --streaming True"),
    "in order": ({"train_sampling_strategy": "sequential"}, "with --shuffle_buffer 0"),
    "begun again": ({"ignore_data_skip": True}, "--ignore_data_skip True and --streaming True"),
    "epochs": ({"save_strategy": "epoch"}, "--save_strategy epoch and --streaming True"),
    "buffer of a list": ({"streaming": False}, "--shuffle_buffer belongs to --streaming True"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_loaded(
    changes: dict[str, Any], message: str, sources: list[str], tmp_path: Path
) -> None:
    assert parse_args(streaming(tmp_path / "out", sources)).data.streaming  # the rest of it is right
    with pytest.raises(FlagError, match=message):
        parse_args(streaming(tmp_path / "out", sources, **changes))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples(workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = [str(data_with_bad_rows(tmp_path))]
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": 1, "max_steps": 4}
    with pytest.raises(BadSampleError, match=r"data\.json, row [13]"):
        main(streaming(tmp_path / "stop", data, **options))
    main(streaming(tmp_path / "out", data, on_bad_sample="skip", **options))
    assert "2 samples were skipped" in capfd.readouterr().out


def test_evaluation_is_on_a_list_of_rows(sources: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    held_out = LLAVA / "data" / "finetune.json"
    options = {"eval_data_path": held_out, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    main(streaming(tmp_path, sources, **options, requires_image=True))
    printed = capfd.readouterr().out
    assert "a stream of" in printed
    assert "shuffled in a buffer of 3 rows" in printed
    assert f"{len(ROWS)} rows of {held_out}" in printed
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("eval_text_loss" in entry for entry in history)  # no row of text is trained on, all are measured
