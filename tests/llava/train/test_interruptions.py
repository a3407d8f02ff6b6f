"""Runs that are killed, run out of disk or meet a NaN: the last checkpoint stays whole, and resuming is exact.

The runs are children that this process forks, so that a kill costs no new start of Python.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.data.dataset import LazySupervisedDataset
from llava.errors import CheckpointError, FlagError, LlavaError, TrainingError
from llava.model.checkpoint import save_checkpoint
from llava.model.formats import read_tensors
from llava.runtime.output import claim
from llava.runtime.saving import publish_files, publish_folder, remove_leftovers, rotate, staging_path
from llava.train.train import build_run, main, parse_args
from tests.llava.train.launching import launch_runs
from tests.llava.train.test_training import BASE, HYDRA, RECIPES, command_line, losses

RUN: dict[str, Any] = HYDRA | {"max_steps": 6, "save_steps": 2, "save_total_limit": 2}
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def child(work: Callable[[], Any], report: Path) -> int:
    """Run `work` in a forked process; returns its exit status as `waitpid` codes it, errors are written to `report`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except LlavaError as error:
            report.write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def count_file_events(output: Path, act: Callable[[int], None]) -> None:
    """Call `act` with 1, 2, 3, ... before each operation of this process on a file or folder in `output`."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(output)):
            count += 1
            act(count)

    sys.addaudithook(hook)


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every trained tensor in a folder, without those of checkpoints below it."""
    files = [path for path in folder.rglob("*.safetensors") if path.relative_to(folder).parts[0][:10] != "checkpoint"]
    return {f"{path.relative_to(folder)}:{name}": value for path in files for name, value in read_tensors(path).items()}


def equal(one: Path, other: Path) -> bool:
    left, right = tensors(one), tensors(other)
    return bool(left) and left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_checkpoints_whole(output: Path, reference: Path) -> None:
    """Each checkpoint of a killed run has every file of the uninterrupted one's, and its tensors."""
    for folder in output.glob("checkpoint-*"):
        expected = reference / folder.name
        names = {str(path.relative_to(expected)) for path in expected.rglob("*")}
        assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == names
        assert equal(folder, expected), folder
        for name in ("optimizer.pt", "scheduler.pt"):
            assert torch.load(folder / name, weights_only=True).keys()
        step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
        assert folder.name == f"checkpoint-{step}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts; it keeps all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    main(command_line(folder, **RUN | {"save_total_limit": 9}))
    return folder


@pytest.fixture(scope="module")
def events(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many file operations a whole run makes in its output folder."""
    folder = tmp_path_factory.mktemp("counted")
    counted = folder / "count"

    def work() -> None:
        count_file_events(folder / "out", lambda number: counted.write_text(str(number)))
        main(command_line(folder / "out", **RUN))

    assert child(work, folder / "report") == 0
    assert equal(folder / "out", whole)
    return int(counted.read_text())


def run_with_kills(output: Path, whole: Path, arm: list[Callable[[], None]]) -> int:
    """Start the run once with each of `arm`, which kills it, and at last undisturbed; returns the number of kills."""
    kills = 0
    for weapon in arm:

        def work(weapon: Callable[[], None] = weapon) -> None:
            weapon()
            main(command_line(output, **RUN))

        kills += os.WIFSIGNALED(child(work, output.with_suffix(".txt")))
        assert_checkpoints_whole(output, whole)
    assert child(lambda: main(command_line(output, **RUN)), output.with_suffix(".txt")) == 0
    assert losses(output) == losses(whole)
    assert equal(output, whole)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(output.glob("tmp-*"))
    return kills


@pytest.mark.slow
def test_killed_while_saving(whole: Path, events: int, tmp_path: Path) -> None:
    """SIGKILL before file operations drawn at random: while files are written, renamed, deleted."""
    assert events > 100
    draw = random.Random(5)
    for attempt in range(3):
        moments = [draw.randint(1, events) for _ in range(3)]

        def arm(moment: int, output: Path = tmp_path / f"out{attempt}") -> Callable[[], None]:
            return lambda: count_file_events(output, lambda number: kill_me() if number == moment else None)

        weapons = [arm(moment) for moment in sorted(moments, reverse=True)]
        assert run_with_kills(tmp_path / f"out{attempt}", whole, weapons) >= 1


@pytest.mark.slow
def test_killed_at_random_moments(whole: Path, tmp_path: Path) -> None:
    """SIGKILL by the clock, in whatever the run is doing, at shares of the time that a run takes on this machine."""
    started = time.monotonic()
    assert child(lambda: main(command_line(tmp_path / "timed", **RUN)), tmp_path / "timed.txt") == 0
    duration = time.monotonic() - started
    draw = random.Random(6)

    def arm(share: float) -> Callable[[], None]:
        def start() -> None:
            timer = threading.Timer(share * duration, kill_me)
            timer.daemon = True
            timer.start()

        return start

    shares = [draw.uniform(low, low + 0.2) for low in (0.1, 0.7, 0.5, 0.3, 0.1)]
    assert run_with_kills(tmp_path / "out", whole, [arm(share) for share in shares]) >= 1


def resumable(whole: Path, output: Path) -> Path:
    """An output folder of a run that stopped after its second update."""
    shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    return output


def test_files_that_cannot_be_written(whole: Path, tmp_path: Path) -> None:
    """Any file above 20 KB fails, as on a full disk: a clear error, no half of a checkpoint, the last one whole."""
    output = resumable(whole, tmp_path / "out")
    report = tmp_path / "report"

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        main(command_line(output, **RUN))

    assert os.WEXITSTATUS(child(work, report)) == 1
    text = report.read_text()
    assert text.startswith("TrainingError")
    assert "checkpoint-4: could not be written" in text
    assert f"The last checkpoint is whole: {output}/checkpoint-2" in text
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-2", "run.json"]
    assert_checkpoints_whole(output, whole)
    main(command_line(output, **RUN))
    assert losses(output) == losses(whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_full_disk(whole: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (whole / "checkpoint-2").rglob("*")) * 3 // 2
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], check=False).returncode:
        pytest.skip("this machine does not let a test mount a disk")
    try:
        output = resumable(whole, disk / "out")
        with pytest.raises(TrainingError, match=r"checkpoint-4: could not be written.*checkpoint-2"):
            main(command_line(output, **RUN))
        assert_checkpoints_whole(output, whole)
        assert not list(output.glob("tmp-*"))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FlagError, match=r"--output_dir .* cannot be written"):
        main(command_line(tmp_path / "file" / "out", **RUN))


def assert_finite(output: Path) -> None:
    for folder in output.glob("checkpoint-*"):
        assert all(bool(torch.isfinite(value).all()) for value in tensors(folder).values())


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_nan_is_never_saved(what: str, tmp_path: Path) -> None:
    options = RUN | {"save_steps": 1, "save_total_limit": 9}
    run = build_run(parse_args(command_line(tmp_path, **options)))
    weight = next(weight for weight in run.model.parameters() if weight.requires_grad)

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        return gradient * float("nan") if run.trainer.state.global_step == 2 else None

    def spoil_weights(*_: Any) -> None:
        if run.trainer.state.global_step == 2:
            weight.data.fill_(float("inf"))

    if what == "loss":
        run.model.register_forward_pre_hook(spoil_weights)
    else:
        weight.register_hook(spoil)
    with pytest.raises(TrainingError, match=rf"the {what} is (nan|inf) at update 3 of 6.*checkpoint-2"):
        run.trainer.train()
    assert sorted(path.name for path in tmp_path.glob("*-*")) == ["checkpoint-1", "checkpoint-2"]
    assert_finite(tmp_path)


def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    run = build_run(parse_args(command_line(tmp_path, **RUN)))
    next(weight for weight in run.model.parameters() if weight.requires_grad).data[0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        save_checkpoint(run.model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_data_worker_that_dies(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, parent = LazySupervisedDataset.__getitem__, os.getpid()

    def dies(self: LazySupervisedDataset, index: int) -> Any:
        if os.getpid() != parent and index == len(self) - 1:
            kill_me()
        return prepare(self, index)

    output = resumable(whole, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(LazySupervisedDataset, "__getitem__", dies)
        with pytest.raises(TrainingError, match=r"prepares data died at update \d.*last checkpoint is whole"):
            main(command_line(output, **RUN, dataloader_num_workers=1))
    assert_checkpoints_whole(output, whole)
    main(command_line(output, **RUN))
    assert losses(output) == losses(whole)


@pytest.mark.slow
def test_process_that_is_lost(tmp_path: Path) -> None:
    """One of two processes is killed: the other ends within the limit, and both together go on from the checkpoint."""
    options = HYDRA | {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "ddp_backend": "gloo"}
    lost = {"arguments": command_line(tmp_path / "out", **options), "killed_at": 3}
    with pytest.raises(AssertionError, match="exitcode  : -9"):
        launch_runs(2, [lost], tmp_path)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    runs = [{"arguments": command_line(tmp_path / name, **options)} for name in ("whole", "out")]
    launch_runs(2, runs, tmp_path)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert equal(tmp_path / "out", tmp_path / "whole")


def test_generation_config_of_vicuna(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    wrong = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "max_length": 4096}
    (base / "generation_config.json").write_text(json.dumps(wrong))
    options = RECIPES["full"][0] | {"max_steps": 1, "model_name_or_path": base}
    main(command_line(tmp_path / "out", **options))
    assert "left out: temperature, top_p" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["max_length"] == 4096
    assert not {"temperature", "top_p"} & set(saved)


def checkpoint(folder: Path, step: int) -> Path:
    """What the code knows a run's checkpoint by."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def test_publishing_replaces_only_what_is_complete(tmp_path: Path) -> None:
    target, staged = tmp_path / "checkpoint-3", staging_path(tmp_path / "checkpoint-3")
    for folder, text in ((target, "old"), (staged, "new")):
        checkpoint(folder, 3)
        (folder / "file").write_text(text)
    assert staged.name == "tmp-checkpoint-3"
    publish_folder(staged, target)
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_publishing_files_keeps_the_others(tmp_path: Path) -> None:
    (claim(tmp_path / "tmp-final") / "deep").mkdir()
    (tmp_path / "tmp-final" / "deep" / "file").write_text("new")
    (tmp_path / "other").write_text("kept")
    publish_files(tmp_path / "tmp-final", tmp_path)
    assert (tmp_path / "deep" / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "other"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 10, 3):
        checkpoint(tmp_path / f"checkpoint-{step}", step)
    rotate(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 4
    rotate(tmp_path, 2, best=str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-10"]


def test_leftovers_are_removed(tmp_path: Path) -> None:
    (claim(tmp_path / "tmp-checkpoint-3") / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    assert remove_leftovers(tmp_path) == ["tmp-checkpoint-3"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert remove_leftovers(tmp_path / "missing") == []
