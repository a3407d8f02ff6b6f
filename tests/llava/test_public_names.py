"""`import llava` brings the public names when they are used, and nothing before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import llava
from llava.extension import Extension, installed_extensions
from llava.model.builder import load_pretrained_model
from tests.structure import ROOT

PUBLIC = {
    "Extension": Extension,
    "installed_extensions": installed_extensions,
    "load_pretrained_model": load_pretrained_model,
}


def run(code: str, folder: Path) -> str:
    """What a fresh interpreter prints in an empty folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    assert getattr(llava, name) is PUBLIC[name]
    assert name in llava.__all__
    assert name in dir(llava)


def test_all_of_them() -> None:
    found: dict[str, object] = {}
    exec("from llava import *", found)  # noqa: S102
    assert {name for name in found if name != "__builtins__"} == {*PUBLIC, "__version__"} == set(llava.__all__)


def test_the_version_is_that_of_the_project() -> None:
    assert f'version = "{llava.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_import_llava_is_cheap(tmp_path: Path) -> None:
    """Neither libraries nor, before a name is used, a module of ours that needs them."""
    heavy = "{'torch', 'transformers', 'numpy', 'peft', 'PIL', 'llava.extension', 'llava.model'}"
    assert run(f"import sys, llava; dir(llava); print({heavy} & set(sys.modules))", tmp_path) == "set()\n"


def test_a_name_is_imported_when_it_is_used(tmp_path: Path) -> None:
    code = "import sys, llava; llava.load_pretrained_model; print('torch' in sys.modules, 'llava.model' in sys.modules)"
    assert run(code, tmp_path) == "True True\n"


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'llava' has no attribute 'load_pretrained'"):
        _ = llava.load_pretrained
    with pytest.raises(ImportError, match="cannot import name 'load_pretrained'"):
        exec("from llava import load_pretrained", {})  # noqa: S102
