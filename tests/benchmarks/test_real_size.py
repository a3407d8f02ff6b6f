"""The benchmark of the real size on a tiny model: every step, its record and tables, and what continues a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import real_size, real_size_steps
from benchmarks.llava_models import SEVEN_B
from llava.errors import FlagError

TINY = ["--layers", "2", "--hidden", "256", "--vocabulary", "800", "--image", "28", "--tokens", "2", "--words", "4"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps run in this process; the list of those that were run."""
    ran: list[str] = []

    def run(step: str, folder: Path, args: Any, record: Mapping[str, Any]) -> dict[str, Any]:
        ran.append(step)
        (folder / real_size.GIVEN).write_text(json.dumps(record), encoding="utf-8")
        words = [*TINY, "--child", step, "--folder", str(folder), "--output", str(folder / f"{step}.json")]
        real_size.main(words)
        found: dict[str, Any] = json.loads((folder / f"{step}.json").read_text(encoding="utf-8"))
        return found

    monkeypatch.setattr(real_size, "run_child", run)
    return ran


def test_the_default_is_the_published_size() -> None:
    assert real_size.shape_of(real_size.build_parser().parse_args([])) == SEVEN_B


def test_every_step_is_recorded_and_not_measured_again(in_process: list[str], tmp_path: Path) -> None:
    folder, output = tmp_path / "weights", tmp_path / "size.json"
    words = [*TINY, "--folder", str(folder), "--output", str(output)]
    real_size.main([*words, "--steps", "weights", "load", "--keep"])
    assert in_process == ["load"]
    record = real_size.main(words)
    assert in_process == ["load", "answer", "update", "floor"], "what the record has is left out"
    assert not folder.exists(), "the weights are removed"
    assert json.loads(output.read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    found = {name: step["found"] for name, step in record["steps"].items()}
    assert list(found) == list(real_size.STEPS)
    assert found["answer"]["tokens"] == 2
    update = found["update"]
    assert sum(update["parts"].values()) == pytest.approx(update["seconds"])
    measured = ("tower", "splicing", "decoder, forward", "head and loss, forward", "decoder, recomputation", "backward")
    assert all(update["parts"][name] > 0 for name in (*measured, "optimizer"))
    assert found["floor"]["update"]["flops"] > 0
    assert found["floor"]["memory"]["weights"] > 2 * found["load"]["parameters"], "bytes of bfloat16, and of adapters"
    table = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "| decoder, recomputation |" in table
    assert "Floor: " in table
    with pytest.raises(FlagError, match="name another file"):
        real_size.main([*words, "--tokens", "3"])


def test_the_command_is_the_published_one() -> None:
    """Every option of the README's command of MLLM-HydraLoRA, apart from paths, saving and workers."""
    readme = (Path(real_size.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("python -m llava.train.train_mem \\")[2].partition("```")[0].replace("\\", "").split()
    published = dict(zip(real_size_steps.PUBLISHED.split()[::2], real_size_steps.PUBLISHED.split()[1::2], strict=True))
    own = {"--model_name_or_path", "--data_path", "--image_folder", "--vision_tower", "--output_dir"}
    own |= {"--save_strategy", "--save_steps", "--save_total_limit", "--dataloader_num_workers"}
    given = {shown[place]: shown[place + 1] for place in range(0, len(shown), 2)}
    assert {name: published.get(name) for name in given.keys() - own} == {
        name: value for name, value in given.items() if name not in own
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hidden", "100"], "multiple of 256"),
        (["--keep"], "pass --folder"),
        (["--steps", "floor"], "measure that too"),
        (["--output", "size.txt"], "ends in .json"),
    ],
)
def test_refused(words: list[str], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        real_size.main([*TINY, *words])
