"""The demo and the generator delete only what they themselves have made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.errors import FlagError
from llava.runtime.output import MARKER
from playground import demo, generate
from playground.generate import BASE, build, build_steps
from playground.outputs import check_removable, remove_earlier_run
from playground.recipe import RECIPE_FILE, minimal_recipe
from tests.reliability.snapshots import snapshot

Make = Callable[[Path], object]


def folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "mine.txt").write_text("mine")


def link(path: Path) -> None:
    folder(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def of_a_demo(path: Path, output: str | None = None, base: str = BASE) -> Path:
    """What a run leaves, as far as names and its record go."""
    path.mkdir(parents=True)
    training, model = {"output_dir": output or str(path)}, {"model_name_or_path": f"somewhere/{base}"}
    (path / "run.json").write_text(json.dumps({"arguments": {"training": training, "model": model}}))
    for name in ("config.json", "adapter_model.safetensors", "checkpoint-2/trainer_state.json", "tokenizer.model"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    return path


def add(name: str) -> Make:
    def make(path: Path) -> None:
        added = of_a_demo(path) / name
        added.mkdir() if "." not in name else added.write_text("mine")

    return make


FOREIGN: dict[str, Make] = {
    "a folder": folder,
    "a link": link,
    "a file": lambda path: (path.parent.mkdir(parents=True, exist_ok=True), path.write_text("mine")),
    "a link to nothing": lambda path: (path.parent.mkdir(parents=True, exist_ok=True), path.symlink_to("nothing")),
    "a run of another name": lambda path: of_a_demo(path, output="checkpoints/mine"),
    "a run on another base": lambda path: of_a_demo(path, base="llava-v1.5-7b"),
    "a broken record": lambda path: (folder(path), (path / "run.json").write_text("[")),
    "a record of something else": lambda path: (folder(path), (path / "run.json").write_text("{}")),
    "a note in the run": add("notes.txt"),
    "a folder in the run": add("mine"),
    "a user's tmp- folder in the run": add("tmp-mine"),
}


@pytest.mark.parametrize("name", [demo.TUNED, demo.SPARSE])
@pytest.mark.parametrize("kind", FOREIGN)
def test_the_demo_refuses_a_foreign_checkpoint(kind: str, name: str, tmp_path: Path) -> None:
    """Before anything is built."""
    FOREIGN[kind](tmp_path / "out" / "checkpoints" / name)
    before = snapshot(tmp_path)
    with pytest.raises(FlagError, match=rf"{name}: .*left as it is.*--results"):
        demo.main(["--minimal", "--output", str(tmp_path / "data"), "--results", str(tmp_path / "out")])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_trains_refuses_it_too(kind: str, tmp_path: Path) -> None:
    FOREIGN[kind](tmp_path / "run")
    before = snapshot(tmp_path)
    with pytest.raises(FlagError, match="left as it is"):
        remove_earlier_run(tmp_path / "run")
    assert snapshot(tmp_path) == before


def test_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    run = of_a_demo(tmp_path / "run")
    (run / "tmp-checkpoint-5").mkdir()
    (run / "tmp-checkpoint-5" / MARKER).write_text("{}")
    check_removable(run)
    remove_earlier_run(run)
    assert not run.exists()
    remove_earlier_run(run)
    run.mkdir()
    remove_earlier_run(run)


PRODUCTS = [
    step.target.relative_to("at") / name
    for step in build_steps(generate.Playground(Path("at"), minimal_recipe(), {}))
    for name in (*step.products, f".partial-{step.name}")
]


@pytest.mark.parametrize("made", [None, []], ids=["no record", "a build that has made nothing yet"])
@pytest.mark.parametrize("make", [folder, link], ids=["folder", "link"])
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_a_build_refuses_names_that_are_taken(
    product: Path, make: Make, made: list[str] | None, tmp_path: Path
) -> None:
    make(tmp_path / product)
    recipe = minimal_recipe()
    if made is not None:
        record = {"fingerprint": recipe.fingerprint(), "threads": 1, "recipe": {}, "seconds": {}, "made": made}
        (tmp_path / RECIPE_FILE).write_text(json.dumps(record))
    before = snapshot(tmp_path)
    for fresh in (False, True):
        with pytest.raises(FlagError, match=rf"{product.name} exists"):
            build(tmp_path, recipe, fresh=fresh)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", ["[]", "text", "{}", ""])
def test_a_file_of_the_records_name_is_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(FlagError, match=rf"{RECIPE_FILE}: already exists"):
        build(tmp_path, minimal_recipe())
    assert snapshot(tmp_path) == before
