"""An output never falls on an input: programs times hostile places, compared byte for byte before and after."""

from __future__ import annotations

import json
import operator
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hydralora import components
from hydralora.text.arguments import parse_args as parse_text
from hydralora.tuner.original import export_adapter, import_adapter
from llava.convert.hf import from_hf, to_hf
from llava.convert.original import export_original
from llava.data import check
from llava.errors import LlavaError
from llava.eval import eval_gqa, eval_mme, eval_science_qa, eval_seed, report, score
from llava.eval.answering.options import refuse_input_as_answers
from llava.eval.scoring import mmbench, submission
from llava.model.delta import combine
from llava.model.full_weights import write_full_weights
from llava.runtime.places import Input, folder_problems
from llava.train.arguments import parse_args as parse_llava
from mma.lavin.adapter_files import export_file, import_file
from mma.lavin.data import mixture
from mma.lavin.merging import merge_checkpoint
from mma.lavin.train_arguments import parse_args as parse_lavin
from scripts import extract_mm_projector
from tests.command_lines import ROOT
from tests.reliability.snapshots import snapshot

FILES = {
    "disk/coco/a.png": "image",
    "checkpoints/base/config.json": '{"model_type": "llama"}',
    "checkpoints/base/model.safetensors": "weights",
    "checkpoints/tower/config.json": '{"model_type": "clip"}',
    "checkpoints/pretrain/mm_projector.bin": "weights",
    "data/data.json": "[]",
    "data/images/b.png": "image",
    "lavin/problems.json": "{}",
    "lavin/pid_splits.json": "{}",
    "lavin/captions.json": "{}",
    "lavin/images/train/1.png": "image",
    "weights/7B/params.json": "{}",
    "text/train.json": "[]",
    "held-out/test.json": "[]",
    "eval/questions.jsonl": '{"question_id": 1, "text": "?", "label": "a"}\n',
    "eval/answers.jsonl": '{"question_id": 1, "text": "a"}\n',
    "eval/annotation.json": "{}",
    "eval/a.result.json": "{}",
    "eval/MME/existence/1.txt": "q\tYes\n",
    "home/notes.txt": "mine",
    "work/notes.txt": "mine",
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inputs of every program, a home, and a working folder; images partly behind a link."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "data" / "images" / "coco").symlink_to(tmp_path / "disk" / "coco")
    (tmp_path / "lavin" / "images" / "test").symlink_to(tmp_path / "disk" / "coco")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


# Folders of a run


@dataclass(frozen=True)
class Trainer:
    """A training program: its parser, options, and which of them are inputs by their paths in the world.

    `images` is the input that is a folder of images.
    """

    parse: Callable[[list[str]], Any]
    inputs: dict[str, str]
    words: tuple[str, ...] = ()
    images: str | None = None

    def command(self, world: Path, output: str) -> list[str]:
        named = [word for flag, path in self.inputs.items() for word in (flag, str(world / path))]
        return [*named, *self.words, "--output_dir", output]


PLAIN = ("--use_cpu", "True", "--report_to", "none")
TRAINERS = {
    "llava.train.train": Trainer(
        parse_llava,
        {
            "--model_name_or_path": "checkpoints/base",
            "--vision_tower": "checkpoints/tower",
            "--pretrain_mm_mlp_adapter": "checkpoints/pretrain/mm_projector.bin",
            "--data_path": "data/data.json",
            "--image_folder": "data/images",
        },
        PLAIN,
        "data/images",
    ),
    "mma.train": Trainer(
        parse_lavin,
        {"--data_root": "lavin", "--llama_model_path": "weights", "--caption_file": "lavin/captions.json"},
        ("--device", "cpu", *PLAIN[2:]),
        "lavin",
    ),
    "hydralora.finetune": Trainer(
        parse_text,
        {
            "--model_name_or_path": "checkpoints/base",
            "--tokenizer_name_or_path": "checkpoints/tower",
            "--dataset_dir": "text",
            "--validation_file": "held-out/test.json",
        },
        ("--do_train", *PLAIN),
    ),
}

EMPTY_OR_MACHINE = ["", " ", ".", "./", "..", "../.", "/", "//", "~", "$HOME", "$HOME/..", "$WORLD"]


def spellings(world: Path, place: Path) -> Iterator[str]:
    """Ways to write a path that does not spell it out: relative, with dots, through links to it and to its parent."""
    yield str(place)
    yield os.path.relpath(place)
    yield f"{place.parent}/./{place.name}/../{place.name}/"
    links = world / "links"
    links.mkdir(exist_ok=True)
    for target, rest in ((place, ""), (place.parent, f"/{place.name}")):
        if not target.exists():
            continue
        link = links / f"{len(list(links.iterdir()))}"
        link.symlink_to(target)
        yield f"{link}{rest}"


def places_inside(world: Path, trainer: Trainer, path: str) -> Iterator[Path]:
    """Places inside an input that are none for an output; in a folder of images, those where something is already."""
    if path != trainer.images:
        yield from (world / path / "out", world / path / "deep" / "er")
        return
    for name in ("there", "deep/er"):
        (world / path / name).mkdir(parents=True, exist_ok=True)
        (world / path / name / "c.png").write_text("image")
        yield world / path / name


def hostile_places(world: Path, trainer: Trainer) -> Iterator[str]:
    """Each input, what is inside it, and what is around it, in every spelling."""
    for path in trainer.inputs.values():
        for place in (world / path, *places_inside(world, trainer, path), (world / path).parent):
            yield from spellings(world, place)


def refused(world: Path, work: Callable[[], Any], *words: str) -> str:
    before = snapshot(world)
    with pytest.raises((LlavaError, ValueError)) as error:
        work()
    assert snapshot(world) == before
    for word in words:
        assert word in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_never_writes_into_an_input(name: str, world: Path) -> None:
    trainer, count, read = TRAINERS[name], 0, 0
    for output in list(hostile_places(world, trainer)):
        command = trainer.command(world, output)
        said = refused(world, lambda command=command: trainer.parse(command), "--output_dir", "name a")
        assert any(words in said for words in ("which the run reads", "is a file", "contains the folder"))
        count += 1
        read += "which the run reads" in said
    assert count >= 16 * len(trainer.inputs)
    assert read >= count // 2


@pytest.mark.parametrize("output", EMPTY_OR_MACHINE)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_never_writes_into_a_folder_of_the_machine(name: str, output: str, world: Path) -> None:
    trainer = TRAINERS[name]
    written = output.replace("$HOME", str(world / "home")).replace("$WORLD", str(world))
    refused(world, lambda: trainer.parse(trainer.command(world, written)), "--output_dir")


@pytest.mark.parametrize("output", ["disk/coco", "disk/coco/out", "data/images/coco/out"])
def test_a_run_never_writes_behind_a_link_of_the_image_folder(output: str, world: Path) -> None:
    trainer = TRAINERS["llava.train.train"]
    refused(world, lambda: trainer.parse(trainer.command(world, str(world / output))), "--image_folder")


@pytest.mark.parametrize(
    ("output", "make"),
    [
        ("new", None),
        ("checkpoints/new", None),
        ("checkpoints/base-lora", None),
        ("data/out", None),
        ("work/out", None),
        ("home/out", None),
        ("there", Path.mkdir),
        ("a-link", lambda path: path.symlink_to(path.parent / "home" / "big", target_is_directory=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", TRAINERS)
def test_usual_places_are_accepted(name: str, output: str, make: Callable[[Path], Any] | None, world: Path) -> None:
    """Next to the base, next to the data file, below the working folder or the home, behind a link of one's own."""
    (world / "home" / "big").mkdir()
    if make is not None:
        make(world / output)
    TRAINERS[name].parse(TRAINERS[name].command(world, str(world / output)))


@pytest.mark.parametrize("kind", ["new", "empty", "a run's"])
@pytest.mark.parametrize("name", [name for name, trainer in TRAINERS.items() if trainer.images])
def test_a_folder_of_the_runs_own_may_be_inside_the_images(name: str, kind: str, world: Path) -> None:
    trainer = TRAINERS[name]
    output = world / str(trainer.images) / "runs" / "first"
    if kind != "new":
        output.mkdir(parents=True)
    if kind == "a run's":
        (output / "run.json").write_text("{}")
        (output / "loss.png").write_text("image")
    for spelling in list(spellings(world, output)):
        trainer.parse(trainer.command(world, spelling))


def test_names_of_a_hub_and_of_open_clip() -> None:
    inputs = [Input("--base", "lmsys/vicuna"), Input("--tower", "open_clip:ViT-L-14/laion/weights.pt")]
    for output, hit in {
        "lmsys/vicuna": "--base",
        "./lmsys/vicuna/out": "--base",
        "laion/weights.pt": "--tower",
    }.items():
        assert hit in folder_problems("--output_dir", output, inputs)[0]
    assert folder_problems("--output_dir", "lmsys/vicuna-lora", inputs) == []


# Folders and files that must be new

Write = Callable[[Path, Path, str], Any]
"""From an input, a second one and the output."""

EXPORTERS: dict[str, Write] = {
    "llava.convert to-original": lambda one, two, output: export_original(one, output, str(two)),
    "llava.convert to-hf": lambda one, two, output: to_hf(one, output, str(two)),
    "llava.convert from-hf": lambda one, two, output: from_hf(one, output),
    "merge_lora_weights, consolidate": lambda one, two, output: write_full_weights(one, output, str(two)),
    "make_delta": lambda one, two, output: combine(two, one, Path(output), operator.sub),
    "apply_delta": lambda one, two, output: combine(two, one, Path(output), operator.add),
    "mma.merge": lambda one, two, output: merge_checkpoint(one, output, model_base=str(two)),
    "mma.lavin.convert import": lambda one, two, output: import_file(one / "config.json", output, str(one), str(two)),
    "hydralora.convert from-original": lambda one, two, output: import_adapter(one, Path(output)),
    "hydralora.convert to-original": lambda one, two, output: export_adapter(one, Path(output)),
}


@pytest.mark.parametrize("name", EXPORTERS)
def test_a_converted_checkpoint_never_falls_on_its_input(name: str, world: Path) -> None:
    one, two = world / "checkpoints" / "base", world / "checkpoints" / "tower"
    for output in [*spellings(world, one / "out"), *spellings(world, one / "deep" / "er")]:
        refused(world, lambda output=output: EXPORTERS[name](one, two, output), "lies inside")
    for output in [*spellings(world, one), *spellings(world, world / "checkpoints"), str(world / "data" / "data.json")]:
        refused(world, lambda output=output: EXPORTERS[name](one, two, output), "already exists")
    if "hydralora" not in name:  # these are paths there, and Path("") is the working folder
        for output in ("", " "):
            refused(world, lambda output=output: EXPORTERS[name](one, two, output), "the output")
    refused(world, lambda: EXPORTERS[name](one, two, "."), "the output .", "the command is run in")
    for output in ("..", "/"):
        refused(world, lambda output=output: EXPORTERS[name](one, two, output), f"{output}: already exists")


@pytest.mark.parametrize("write", ["extract", "mma.lavin.convert export"])
def test_an_exported_file_never_replaces_one(write: str, world: Path) -> None:
    base = world / "checkpoints" / "base"

    def run(output: str) -> None:
        if write == "extract":
            extract_mm_projector.main(["--model-path", str(base), "--output", output])
        else:
            export_file(base, output)

    there = spellings(world, world / "checkpoints" / "pretrain" / "mm_projector.bin")
    there = [output for output in there if os.path.exists(output)]  # a path that goes through a file leads nowhere
    assert len(there) == 4
    for output in there:
        said = refused(world, lambda output=output: run(output))
        unnamed = write == "extract" and not output.endswith(".bin")  # a link of another name
        assert ("the name must end in" if unnamed else "already exists; choose another path") in said
    for output in ("", "."):
        refused(world, lambda output=output: run(output), "the name must end in" if write == "extract" else "is empty")


# Reports and results, which replace earlier ones

Report = Callable[[Path, str], Any]
"""From the world and the output; what it reads follows from the table."""

CHECK = ["--model_name_or_path", "B", "--image_folder", "I"]


def _check(flag: str) -> Report:
    def run(world: Path, output: str) -> Any:
        paths = {"B": str(world / "checkpoints" / "base"), "I": str(world / "data" / "images")}
        words = [paths.get(word, word) for word in CHECK]
        return check.main([str(world / "data" / "data.json"), *words, flag, output])

    return run


def _main(main: Callable[[list[str]], Any], *words: str, output: str) -> Report:
    """A program whose words that begin with `@` are paths in the world."""

    def run(world: Path, path: str) -> Any:
        return main([*(str(world / word[1:]) if word.startswith("@") else word for word in words), output, path])

    return run


QUESTIONS, ANSWERS, ANNOTATION = "@eval/questions.jsonl", "@eval/answers.jsonl", "@eval/annotation.json"
SCIENCE = ("--base-dir", "@eval", "--result-file", ANSWERS)
REPORTS: dict[str, tuple[Report, tuple[str, ...]]] = {
    "data.check --json": (_check("--json"), ("data/data.json",)),
    "data.check --html": (_check("--html"), ("data/data.json",)),
    "eval.score": (
        _main(score.main, "--question-file", QUESTIONS, "--answers-file", ANSWERS, output="--output"),
        ("eval/questions.jsonl", "eval/answers.jsonl"),
    ),
    "eval_gqa": (
        _main(eval_gqa.main, "--questions", ANNOTATION, "--predictions", ANSWERS, output="--output"),
        ("eval/annotation.json", "eval/answers.jsonl"),
    ),
    "eval_mme": (
        _main(eval_mme.main, "--results_dir", "@eval/MME/existence", output="--output"),
        ("eval/MME/existence/1.txt",),
    ),
    "eval_science_qa --output-file": (
        _main(eval_science_qa.main, *SCIENCE, "--output-result", "@new.json", output="--output-file"),
        ("eval/answers.jsonl",),
    ),
    "eval_science_qa --output-result": (
        _main(eval_science_qa.main, *SCIENCE, "--output-file", "@new.json", output="--output-result"),
        ("eval/answers.jsonl", "new.json"),
    ),
    "convert vqav2": (
        lambda world, output: submission.vqav2(world / "eval/questions.jsonl", world / "eval/answers.jsonl", output),
        ("eval/questions.jsonl", "eval/answers.jsonl"),
    ),
    "convert vizwiz": (
        lambda world, output: submission.vizwiz(world / "eval/questions.jsonl", world / "eval/answers.jsonl", output),
        ("eval/questions.jsonl", "eval/answers.jsonl"),
    ),
    "convert gqa": (
        lambda world, output: submission.gqa(world / "eval/answers.jsonl", output),
        ("eval/answers.jsonl",),
    ),
    "convert mmvet": (
        lambda world, output: submission.mmvet(world / "eval/answers.jsonl", output),
        ("eval/answers.jsonl",),
    ),
    "convert seed": (
        lambda world, output: eval_seed.evaluate(world / "eval/annotation.json", world / "eval/answers.jsonl", output),
        ("eval/annotation.json", "eval/answers.jsonl"),
    ),
    "convert mmbench": (
        lambda world, output: mmbench.write_spreadsheet(
            world / "eval/questions.jsonl", world / "eval/answers.jsonl", output
        ),
        ("eval/questions.jsonl", "eval/answers.jsonl"),
    ),
    "mma.data.mixture": (
        _main(mixture.main, "--data_root", "@lavin", output="--output"),
        ("lavin/alpaca_data.json", "lavin/detail_23k.json", "lavin/conversation_58k.json"),
    ),
    "answers of llava.eval": (
        lambda world, output: refuse_input_as_answers(
            type("Options", (), {"question_file": world / "eval/questions.jsonl"})(), output
        ),
        ("eval/questions.jsonl",),
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_never_replaces_an_input(name: str, world: Path) -> None:
    run, inputs = REPORTS[name]
    for path in inputs:
        (world / path).touch()
        hard = world / "links" / Path(path).name
        hard.parent.mkdir(exist_ok=True)
        hard.hardlink_to(world / path)
        for output in [*spellings(world, world / path), str(hard)]:
            refused(world, lambda output=output: run(world, output), "reads" if "new" not in path else "")
        hard.unlink()
    for output in ("", ".", str(world / "eval"), str(world / "data" / "images")):
        refused(world, lambda output=output: run(world, output), "name a file")


@pytest.mark.parametrize("output", ["eval/MME", "eval/MME/existence", "eval/MME/new", "eval", ".", ""])
def test_files_for_mme_never_fall_on_the_ground_truths(output: str, world: Path) -> None:
    place = str(world / output) if output.startswith("eval") else output
    refused(
        world,
        lambda: submission.mme(world / "eval" / "MME", world / "eval" / "answers.jsonl", place),
        "the output folder",
    )


def test_components_and_comparisons_keep_their_inputs(world: Path) -> None:
    data = world / "text" / "components.json"
    data.write_text("[]")
    refused(world, lambda: components.main([str(data), "--output-dir", str(data.parent)]), "--output-dir")
    (world / "eval" / "report.md").write_text("# mine")
    words = [str(world / "eval" / "report.md"), "--output", str(world / "eval")]
    refused(world, lambda: report.main(words), "also RESULT")


# Launch scripts

WITH_OUTPUT = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("scripts", "run")
    for path in (ROOT / folder).rglob("*.sh")
    if re.search(r"(OUTPUT|ANSWERS)=.*\$\{\1-", path.read_text())
)


@pytest.mark.parametrize("script", WITH_OUTPUT)
@pytest.mark.parametrize("value", ["", None], ids=["empty", "unset"])
def test_an_empty_variable_is_refused_by_every_script(script: str, value: str | None, tmp_path: Path) -> None:
    """Nothing is started; where the variable is not set at all, the script takes its own folder."""
    started = tmp_path / "started"
    stand_in = tmp_path / "launcher"
    stand_in.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >>{started}\n')
    stand_in.chmod(0o755)
    variables = {"LAUNCHER": str(stand_in), "EVAL_LAUNCHER": str(stand_in), "PYTHON": str(stand_in), "ZERO": ""}
    given = {} if value is None else {"OUTPUT": value, "ANSWERS": value}
    done = subprocess.run(
        ["bash", str(ROOT / script)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **variables, **given},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if value is None:
        assert done.returncode == 0, done.stderr
        words = started.read_text().splitlines()
        flag = next(flag for flag in ("--answers-file", "--result-file", "--output_dir") if flag in words)
        assert words[words.index(flag) + 1].strip("./")
    else:
        assert done.returncode != 0
        assert "is set and empty" in done.stderr
        assert not started.exists()


def test_the_list_of_scripts_is_whole() -> None:
    assert len(WITH_OUTPUT) >= 24
    assert json.dumps(WITH_OUTPUT).count("v1_5") == 5
