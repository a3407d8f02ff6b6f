"""The files that go into a checkout: the very files of our packages, readable by Python 3.10 and plain torch."""

from __future__ import annotations

import ast
import difflib
import sys
from pathlib import Path

import pytest

from moe_patch import sources
from moe_patch.errors import PatchError
from moe_patch.extensions import EXTENSIONS, edits_of, modules_of

MODULES = modules_of(list(EXTENSIONS.values()))
FILES = sources.files(MODULES)
ROOT = Path(__file__).resolve().parent.parent.parent
OURS = ("llava", "hydralora", "dynamic", "mma", "moe_patch")
NEW_IN_311 = {"Self", "LiteralString", "Never", "NotRequired", "Required", "Unpack", "assert_never", "StrEnum", "UTC"}


def imports(content: bytes, runtime_only: bool = False) -> list[ast.ImportFrom | ast.Import]:
    tree = ast.parse(content)
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if runtime_only and isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
    }
    found = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and id(n) not in skipped]
    assert found or b"import" not in content
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_carried_file_differs_from_ours_in_its_imports_alone(module: str) -> None:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    target = sources.target_module(module).replace(".", "/")
    ours = path.read_text().splitlines()
    theirs = (FILES.get(f"{target}.py") or FILES[f"{target}/__init__.py"]).decode().splitlines()
    assert len(ours) == len(theirs)
    for old, new in zip(ours, theirs, strict=True):
        if old != new:
            assert old.split(" import ")[1] == new.split(" import ")[1]
            assert new.lstrip().startswith("from llava.extensions_moe")


@pytest.mark.parametrize("name", FILES)
def test_carried_files_run_on_python_310_beside_upstreams_packages(name: str) -> None:
    content = FILES[name]
    ast.parse(content, feature_version=(3, 10))
    known = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", *sys.stdlib_module_names}
    for node in imports(content, runtime_only=True):
        assert isinstance(node, ast.Import) or not NEW_IN_311.intersection(alias.name for alias in node.names)
        for module in [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
            assert module is not None
            if module.partition(".")[0] in OURS:
                path = module.replace(".", "/")
                assert f"{path}.py" in FILES or f"{path}/__init__.py" in FILES, module
            else:
                assert module.partition(".")[0] in known, module


@pytest.mark.parametrize("path", sorted((ROOT / "moe_patch").glob("*.py")), ids=lambda path: path.name)
def test_the_program_needs_python_310_and_its_standard_library_alone(path: Path) -> None:
    ast.parse(path.read_bytes(), feature_version=(3, 10))
    for node in imports(path.read_bytes()):
        assert isinstance(node, ast.Import) or not NEW_IN_311.intersection(alias.name for alias in node.names)
        for module in [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
            assert module.partition(".")[0] in {"moe_patch", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import hydralora.layer\n", "write 'from ... import ...'"),
        ("from hydralora.tuner import HydraLoraConfig\n", r"imports \['hydralora.tuner.HydraLoraConfig'\]"),
        ("from hydralora import layer, linears\n", r"imports \['hydralora.linears'\]"),
        ("import llava.runtime.options\n", "write 'from ... import ...'"),
        ("from llava.runtime.saving import flush\n", r"imports \['llava.runtime.saving.flush'\]"),
        ("from llava.constants import IGNORE_INDEX\n", r"imports \['llava.constants.IGNORE_INDEX'\]"),
    ],
)
def test_an_import_that_cannot_come_along_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(text)
    with pytest.raises(PatchError, match=message):
        sources.rewritten(path, MODULES)


def test_imports_are_rewritten_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    text = (
        "from  hydralora.layer import (\n    RoutedMLP,\n)\nif True:\n    from hydralora import layer  # in hydralora\n"
    )
    path.write_text(text)
    expected = text.replace("from  hydralora.layer", "from  llava.extensions_moe.hydralora.layer").replace(
        "from hydralora import", "from llava.extensions_moe.hydralora import"
    )
    assert sources.rewritten(path, MODULES).decode() == expected
    assert list(difflib.unified_diff(text.splitlines(), expected.splitlines()))


def test_our_llava_is_not_taken_for_upstreams(tmp_path: Path) -> None:
    """Carried modules of it go into the folder of the patch, where upstream has nothing."""
    path = tmp_path / "module.py"
    path.write_text("from llava.runtime.options import option\n")
    assert sources.rewritten(path, MODULES) == b"from llava.extensions_moe.runtime.options import option\n"
    assert "llava/extensions_moe/runtime/options.py" in FILES
    assert all(name.startswith("llava/extensions_moe/") for name in FILES)


def test_two_modules_for_one_place_are_refused() -> None:
    with pytest.raises(PatchError, match=r"llava/extensions_moe/extension\.py is the place of another module"):
        sources.files([*MODULES, "llava.extension"])


def test_every_edit_is_named_once() -> None:
    edits = [edit for file in edits_of(list(EXTENSIONS.values())).values() for edit in file]
    assert len({(edit.file, edit.anchor) for edit in edits}) == len(edits) > 10
