"""The checks of `make test-wheel` themselves: each recognizes the wheel or environment that it is there for."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest

from tests.wheel.environment import (
    PACKAGES,
    ROOT,
    Environment,
    WheelError,
    check_content,
    check_origin,
    expected_files,
)


def save_wheel(path: Path, files: dict[str, bool]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llava_extensions-0.dist-info/METADATA", "")
        for name, executable in files.items():
            item = zipfile.ZipInfo(name)
            item.external_attr = (0o100755 if executable else 0o100644) << 16
            archive.writestr(item, "")
    return path


def test_what_a_wheel_has() -> None:
    files = expected_files(ROOT)
    assert files["llava/scripts/tree/scripts/pretrain.sh"]
    assert not files["llava/scripts/tree/scripts/common.bash"]
    assert {
        "moe_patch/patch.sh",
        "mma/lavin/demo.py",
        "llava/scripts/tree/run/train_dynamic_llava_7b.sh",
    } <= files.keys()
    assert not [
        name for name in files if name.startswith(("playground", "tests", "benchmarks")) or "experiments" in name
    ]
    assert {name.partition("/")[0] for name in files} == set(PACKAGES)


def test_a_wheel_of_this_tree(tmp_path: Path) -> None:
    files = expected_files(ROOT)
    assert check_content(save_wheel(tmp_path / "x.whl", files), ROOT) == len(files)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"moe_patch/patch.sh": None}, "missing: moe_patch/patch.sh"),
        ({"llava/scripts/tree/scripts/zero3.json": None}, "missing: llava/scripts/tree/scripts/zero3.json"),
        ({"playground/demo.py": False}, "should not be there: playground/demo.py"),
        ({"llava/scripts/tree/scripts/pretrain.sh": False}, "executable bit lost"),
    ],
)
def test_a_wheel_that_is_not_as_it_should_be(wrong: dict[str, bool | None], message: str, tmp_path: Path) -> None:
    files = {name: bit for name, bit in (expected_files(ROOT) | wrong).items() if bit is not None}
    with pytest.raises(WheelError, match=message):
        check_content(save_wheel(tmp_path / "x.whl", files), ROOT)


def stand_in(folder: Path, prints: str) -> Environment:
    """An environment whose interpreter prints one thing."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f"#!{sys.executable} -SE\nprint({prints!r})\n")
    python.chmod(0o755)
    return Environment(folder, folder)


def origins(folder: Path, **changes: str) -> str:
    found = {name: str(folder / "lib" / name / "__init__.py") for name in PACKAGES} | {
        "playground": "",
        "benchmarks": "",
    }
    return "\n".join(f"{name} {origin}" for name, origin in (found | changes).items())


def test_origins(tmp_path: Path) -> None:
    folder = tmp_path / "env"
    check_origin(stand_in(folder, origins(folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llava": str(ROOT / "llava" / "__init__.py")}, "llava is not from"),
        ({"hydralora": ""}, "hydralora is not from .*not found"),
        ({"playground": str(ROOT / "playground" / "__init__.py")}, "playground stays in the clone"),
    ],
)
def test_foreign_origins(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "env"
    with pytest.raises(WheelError, match=message):
        check_origin(stand_in(folder, origins(folder, **changes)))


def test_programs_see_nothing_of_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    variables = Environment(tmp_path, tmp_path).variables()
    assert "PYTHONPATH" not in variables
    assert variables["PATH"].split(os.pathsep)[0] == str(tmp_path / "bin")


def test_a_program_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WheelError, match=r"status 3:\nhello"):
        Environment(tmp_path, tmp_path).run(["sh", "-c", "echo hello; exit 3"])
