"""HydraLoRA as a method of PEFT needs torch, transformers and peft, and nothing of a LLaVA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("alone.py")

LOADED = """
import sys
import hydralora
print(sorted(name for name in sys.modules if name.partition(".")[0] == "llava"))
"""

FOREIGN_LLAVA = """
import sys
from hydralora.tuner.versions import has_llava, warn_of_untested
assert has_llava() is False
warn_of_untested()
assert "llava" not in sys.modules
sys.path.insert(0, sys.argv[1])
print(has_llava())
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.versions
@pytest.mark.slow
def test_everything_that_a_user_of_peft_does() -> None:
    done = run(PROGRAM, "--hide")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("hydralora works with torch, transformers, peft alone\n")


def test_an_environment_with_more_is_recognized() -> None:
    """The negative control: without hiding, this environment has `llava`."""
    done = run(PROGRAM)
    assert done.returncode == 1
    assert "this environment has more than torch, transformers, peft: llava, torchvision" in done.stderr


def test_the_import_does_not_load_llava() -> None:
    """Where it is installed. torchvision is imported by PEFT itself, where there is one."""
    done = run("-c", LOADED)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_another_llava_is_never_imported(tmp_path: Path, repository: Path) -> None:
    """Upstream's package has the name too, and an import of it loads a model's classes, or fails."""
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("raise SystemExit('imported')")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(repository)!r}]" + FOREIGN_LLAVA
    done = run("-c", code, repository)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
