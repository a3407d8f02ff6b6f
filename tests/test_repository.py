"""The repository keeps its own rules: who may import whom, documented modules, file sizes, nothing left unfinished."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.structure import (
    MODULES,
    PACKAGES,
    PROGRAMS,
    ROOT,
    circle,
    import_graph,
    imported_modules,
    is_door,
    module_name,
    replaced_by_hand,
)

EXTENSIONS = ("hydralora", "dynamic", "mma", "moe_patch")
MAX_LINES = 500
WITHOUT_A_MODEL = (
    "llava.constants",
    "llava.errors",
    "llava.segments",
    "llava.encoded_images",
    "llava.data.tiling",
    "llava.runtime",
)
"""Modules and folders of llava that know nothing of its model; anybody may use them."""
MAX_MODULES = 32


PYTHON_FILES = sorted(MODULES + PROGRAMS)
LAYERS = [path for path in MODULES if path.name == "layer.py"]
THIS_FILE = Path(__file__).resolve()

SOURCE_FOLDERS = (*PACKAGES, "tests", "docs", "scripts", "run", "benchmarks", ".ci")
NOT_WRITTEN = ("tests/golden", "playground/data", "playground/out")
BINARY_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".safetensors", ".bin", ".pth", ".model", ".npz"})


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=_id)


def _imported_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(path)}


def _written_files() -> list[Path]:
    """Everything people write: the files at the top and in the source folders, without golden data and outputs."""
    paths = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a file in a worktree
    paths += [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    skipped = [ROOT / folder for folder in NOT_WRITTEN]
    return sorted(
        path
        for path in paths
        if path != THIS_FILE  # has to spell what it forbids
        and "__pycache__" not in path.parts
        and not any(path.is_relative_to(folder) for folder in skipped)
    )


def _texts() -> Iterator[tuple[Path, str]]:
    for path in _written_files():
        if path.suffix not in BINARY_SUFFIXES:
            yield path, path.read_text(encoding="utf-8")


def test_the_lists_of_cases_are_not_empty() -> None:
    """Without this, a renamed folder would turn the tests below into tests of nothing."""
    assert {module_name(path).partition(".")[0] for path in MODULES} == set(PACKAGES)
    assert len(MODULES) > 30
    assert [_id(path) for path in LAYERS] == ["dynamic/layer.py", "hydralora/layer.py", "mma/layer.py"]
    assert ROOT / "Makefile" in _written_files()


@_each(MODULES)
def test_every_module_imports_and_says_what_it_is_for(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    assert module.__doc__, f"{_id(path)} has no docstring"
    assert (path.parent / "__init__.py").exists(), f"{_id(path)} lies in a folder without __init__.py"


@_each(PYTHON_FILES)
def test_every_file_has_a_docstring_and_a_readable_length(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{_id(path)} has no docstring"
    lines = text.count("\n")
    assert lines <= MAX_LINES, f"{_id(path)} has {lines} lines; split it by idea"


EXTENSION_PROGRAMS = ROOT / "llava" / "dynamic_eval"
"""Programs of an extension that keep their original names; nothing else of llava may import them."""


@_each([path for path in MODULES if path.is_relative_to(ROOT / "llava") and path.parent != EXTENSION_PROGRAMS])
def test_llava_knows_no_extension(path: Path) -> None:
    assert not _imported_packages(path) & {*EXTENSIONS, "playground"}
    assert not {name for name in imported_modules(path) if name.startswith("llava.dynamic_eval")}


@_each(LAYERS)
def test_layers_import_torch_and_the_standard_library_only(path: Path) -> None:
    foreign = _imported_packages(path) - set(sys.stdlib_module_names) - {"torch"}
    assert not foreign, f"{_id(path)} holds mathematics and imports {sorted(foreign)}"


APPLICATIONS = (ROOT / "mma" / "lavin", ROOT / "dynamic" / "visualize.py")
"""Programs on a LLaVA of their own: they start llava's training and evaluation; no module of a method imports them."""


def _is_method(path: Path) -> bool:
    return path.name != "extension.py" and not any(map(path.is_relative_to, APPLICATIONS)) and not is_door(path)


METHODS = [path for path in MODULES if path.relative_to(ROOT).parts[0] in EXTENSIONS and _is_method(path)]


def _within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@_each(METHODS)
def test_only_extension_py_knows_the_seams_of_llava(path: Path) -> None:
    names = {name for name in imported_modules(path) if name.partition(".")[0] == "llava"}
    foreign = sorted(name for name in names if not _within(name, WITHOUT_A_MODEL))
    assert not foreign, f"{_id(path)} imports {foreign}; only extension.py may"


BY_UPSTREAM = [
    ROOT / "hydralora" / f"{name}.py"
    for name in ("block", "config", "gated", "layer", "model", "moe_args", "original", "patch")
]
"""What `hydralora.patch_llava` needs of this project, where `llava` is upstream's."""


@_each(BY_UPSTREAM)
def test_what_patches_an_object_of_upstreams_needs_no_llava_of_ours(path: Path) -> None:
    assert "llava" not in _imported_packages(path)


@_each(METHODS)
def test_methods_do_without_their_programs(path: Path) -> None:
    assert not [name for name in imported_modules(path) if _within(name, ["mma.lavin", "dynamic.visualize"])]


@_each([path for path in MODULES if path.is_relative_to(ROOT / "llava" / "runtime")])
def test_the_runtime_knows_nothing_of_a_llava(path: Path) -> None:
    names = {name for name in imported_modules(path) if name.partition(".")[0] in PACKAGES}
    assert not [name for name in names if not _within(name, WITHOUT_A_MODEL)]


def test_no_circle_of_imports() -> None:
    """Imports within functions and under `TYPE_CHECKING` included."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle(import_graph())


EXPERIMENTS = ROOT / "benchmarks" / "experiments"


@_each(sorted((EXPERIMENTS / "common").glob("*.py")))
def test_what_experiments_share_knows_none_of_them(path: Path) -> None:
    names = {name for name in imported_modules(path) if _within(name, ["benchmarks.experiments"])}
    assert not [name for name in names if not _within(name, ["benchmarks.experiments.common"])]


def test_no_folder_is_crowded() -> None:
    folders = Counter(path.parent for path in MODULES + PROGRAMS if "golden" not in path.parts)
    assert not {_id(folder): count for folder, count in folders.items() if count > MAX_MODULES}


CONVERTERS = 1600
"""Lines of Python in `scripts/`, where upstream's converters are and nothing else."""


def test_scripts_hold_converters_only() -> None:
    files = list((ROOT / "scripts").rglob("*.py"))
    assert all(path.parent == ROOT / "scripts" for path in files)
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < CONVERTERS


REPLACES_BY_HAND = 3
"""Files that may do so; all others use `llava.runtime.output`."""


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("os.replace(a, b)", 1),
        ("os.rename(a, b)", 1),
        ("shutil.move(a, b)", 1),
        ("from shutil import copy, move", 1),
        ("(folder / name).rename(b)", 1),
        ("path.replace(b)", 1),
        ("path.replace(target=b)", 1),
        ("tempfile.mkstemp(dir=a)", 1),
        ("tempfile.NamedTemporaryFile(dir=a, delete=False)", 1),
        ("tempfile.NamedTemporaryFile(dir=a)", 0),
        ("text.replace('a', 'b')", 0),
        ("dataclasses.replace(config, rank=3)", 0),
        ("signature.replace(parameters=shown)", 0),
        ("put_in_place(a, b)", 0),
    ],
)
def test_what_counts_as_replacing_by_hand(line: str, count: int) -> None:
    assert len(replaced_by_hand(line)) == count


def test_files_are_written_whole_in_one_way() -> None:
    places = {_id(path): lines for path in MODULES + PROGRAMS if (lines := replaced_by_hand(path.read_text("utf-8")))}
    ours = {name: lines for name, lines in places.items() if not name.startswith("tests/")}
    assert {"llava/runtime/output.py", "moe_patch/checkout.py"} <= ours.keys()
    assert len(ours) <= REPLACES_BY_HAND, ours
    assert len(ours["llava/runtime/output.py"]) == 1


STANDALONE = "hydralora/config.py"
"""Has its own: it runs next to upstream's `llava`, which has no `llava.runtime`, without being carried there."""

DEFINED_ONCE = {
    "the check of a configuration's values": ("llava/runtime/checked_config.py", r"^    def _wrong_types\("),
    "the option of a command line": ("llava/runtime/options.py", r"^def _?option\("),
}


@pytest.mark.parametrize(("module", "pattern"), DEFINED_ONCE.values(), ids=DEFINED_ONCE)
def test_what_every_package_needs_is_defined_once(module: str, pattern: str) -> None:
    found = {_id(path): len(re.findall(pattern, path.read_text("utf-8"), re.MULTILINE)) for path in MODULES}
    assert {name: count for name, count in found.items() if count} == {module: 1, STANDALONE: 1}


@_each(MODULES)
def test_nothing_runs_code_from_a_checkpoint(path: Path) -> None:
    unsafe = r"weights_only\s*=\s*False|trust_remote_code\s*=\s*True"
    assert not re.search(unsafe, path.read_text(encoding="utf-8"))


@_each(MODULES)
def test_nothing_is_a_stub(path: Path) -> None:
    """Others' methods may raise it and be caught; ours do what they say."""
    assert not re.search(r"raise\s+NotImplementedError", path.read_text(encoding="utf-8"))


FORBIDDEN = {
    "unfinished work": r"\b(TODO|FIXME|XXX)\b",
    "path of one machine": r"(?<![\w./~-])/(home|root|mnt|work|Users)/\w|(?<![\w./~-])/tmp/wk",
    "path next to one checkout": r"\.\./shared\b|(?<![\w./-])shared/|parents?(\[\d\])? / \"shared\"",
    "choice of a package registry": r"index[-_]url|find[-_]links",
    "swallowed error": r"except (Exception|BaseException)?:\s*\n?\s*pass\b",
    "conflict marker": r"^(<{7}|>{7}) ",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_forbidden_is_in_the_tree(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    hits = [
        f"{_id(path)}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()!r}"
        for path, text in _texts()
        for match in pattern.finditer(text)
    ]
    assert not hits, f"{what}: " + "; ".join(hits[:10])


@pytest.mark.parametrize("name", ["Makefile", "constraints.txt", "pyproject.toml", ".ci/run"])
def test_the_installation_leaves_the_registry_to_the_machine(name: str) -> None:
    assert "://" not in (ROOT / name).read_text(encoding="utf-8")


def test_the_tree_in_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.partition("```text\n")[2].partition("```")[0]
    drawn = set(re.findall(r"^(\w+)/", tree, re.MULTILINE))
    written = {path.relative_to(ROOT).parts[0] for path in _written_files() if path.parent != ROOT}
    assert drawn == {name for name in written if not name.startswith(".")}
    for name in re.findall(r"^  (\w+)/", tree, re.MULTILINE):
        assert (ROOT / "llava" / name).is_dir(), f"README.md draws llava/{name}"


DOCUMENTS = [path for path in _written_files() if path.suffix == ".md"]


def _headings(path: Path) -> set[str]:
    """The anchors of a Markdown file, as the usual viewers make them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def _broken_links(path: Path) -> list[str]:
    """Links of a document to files or headings that are not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        linked = path.parent / name if name else path
        if "://" not in target and not (linked.exists() and (not heading or heading in _headings(linked))):
            broken.append(target)
    return broken


def test_broken_links_are_seen(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "# One & two\n[a](#one--two) [b](b.md) [c](#three) [d](a.md#one--two) [e](a.md#x) [f](https://f)"
    )
    assert _broken_links(document) == ["b.md", "#three", "a.md#x"]


@_each(DOCUMENTS)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    assert not _broken_links(path), f"{_id(path)} links to {_broken_links(path)}"


@_each([path for path in DOCUMENTS if not path.is_relative_to(ROOT / "benchmarks" / "results")])
def test_documents_state_results_and_no_goals(path: Path) -> None:
    """What a benchmark should reach is said by its program, and compared in the record that it writes."""
    if path != ROOT / "benchmarks" / "README.md":
        assert not re.findall(r"\b(?:aims?|goals?|target) of\b", path.read_text(encoding="utf-8"))


def test_no_lock_file() -> None:
    assert not [path.name for path in _written_files() if path.suffix == ".lock" or path.name.endswith("-lock.json")]


def test_every_dependency_is_pinned_once() -> None:
    """One exact version for every requirement of every extra.

    Without `flash`, which needs CUDA to build, and `lmms`, which needs an environment of its own.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {
        "train",
        "data",
        "quant",
        "flash",
        "openclip",
        "serve",
        "eval",
        "harness",
        "lmms",
        "analysis",
        "trl",
        "dev",
    }
    wanted = [
        *project["dependencies"],
        *(name for extra, names in extras.items() if extra not in ("flash", "lmms") for name in names),
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [_normal(line.partition("==")[0]) for line in lines if not line.startswith("#")]
    assert len(pins) == len(set(pins))
    assert all("==" in line for line in lines if not line.startswith("#"))
    missing = {_normal(re.split(r"[<>=!~\[ ]", name)[0]) for name in wanted} - set(pins)
    assert not missing, f"run `make constraints`: no version for {sorted(missing)}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_commands_of_continuous_integration() -> None:
    """The README's own test command first; nothing that resolves versions while it runs."""
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = ["make test", "make test-lowest", "make test-wheel", "make lint"]
    assert [line for line in lines if line.startswith("make")] == commands
