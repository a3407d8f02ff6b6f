"""The template of a run is in every folder that comes from it: checkpoints, merged weights, other layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.convert.original import export_original
from llava.data.check import main as check
from llava.data.trained_template import CHAT_TEMPLATE_KEY, TEMPLATE_KEY, trained_template
from llava.model import apply_delta, consolidate, make_delta
from llava.model.builder import load_pretrained_model
from llava.model.full_weights import write_full_weights
from llava.runtime.files import read_json
from llava.train.steps import say_settings
from llava.train.train import main as train
from llava.train.train import parse_args
from tests.golden import golden_dir
from tests.llava.data.test_chat_template import WITH_BLANKS
from tests.llava.train.test_training import BASE, command_line

LORA = {"lora_enable": True, "lora_r": 4}
STAGE_ONE = {"tune_mm_mlp_adapter": True, "data_path": golden_dir("llava") / "data" / "pretrain.json"}
OTHER = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with a chat template in its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(BASE, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(WITH_BLANKS)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Callable[[str, str], Path]:
    """The folder of a run by its recipe and version; each is trained once."""
    recipes: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA, "stage 1": STAGE_ONE}
    done: dict[tuple[str, str], Path] = {}

    def run(recipe: str, version: str) -> Path:
        if (recipe, version) not in done:
            folder = tmp_path_factory.mktemp("run") / "llava-plain-v1"
            options = {**recipes[recipe], "model_name_or_path": base, "version": version, "max_steps": 2}
            train(command_line(folder, **options))
            done[recipe, version] = folder
        return done[recipe, version]

    return run


def as_before(folder: Path, output: Path) -> Path:
    """A copy of a run's folder as versions wrote it whose `config.json` did not say the template."""
    shutil.copytree(folder, output, copy_function=shutil.copyfile)
    for config in output.rglob("config.json"):
        content = json.loads(config.read_text())
        for key in (TEMPLATE_KEY, CHAT_TEMPLATE_KEY):
            content.pop(key, None)
        config.write_text(json.dumps(content))
        (config.parent / "checkpoint_files.json").unlink(missing_ok=True)
    return output


VERSIONS = {
    "v0": {TEMPLATE_KEY: "v1"},
    "llava_llama_2": {TEMPLATE_KEY: "llava_llama_2"},
    "tokenizer": {TEMPLATE_KEY: "tokenizer", CHAT_TEMPLATE_KEY: WITH_BLANKS},
}


def said(folder: Path) -> dict[str, str]:
    content = read_json(folder / "config.json")
    return {key: content[key] for key in (TEMPLATE_KEY, CHAT_TEMPLATE_KEY) if key in content}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_every_checkpoint_says_it(recipe: str, version: str, runs: Callable[[str, str], Path]) -> None:
    folder = runs(recipe, version)
    assert said(folder) == VERSIONS[version]
    assert said(folder / "checkpoint-2") == VERSIONS[version]


@pytest.mark.parametrize("earlier", [False, True], ids=["today", "an earlier version"])
@pytest.mark.parametrize("version", ["llava_llama_2", "tokenizer"])
@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_what_is_made_of_a_checkpoint_says_it(
    recipe: str, version: str, earlier: bool, runs: Callable[[str, str], Path], base: Path, tmp_path: Path
) -> None:
    folder = runs(recipe, version)
    if earlier:
        folder = as_before(folder, tmp_path / "earlier")
        assert said(folder) == said(folder / "checkpoint-2") == {}
    expected = VERSIONS[version]
    for each in (folder, folder / "checkpoint-2"):
        found = trained_template(each)
        assert found is not None
        assert (found.name, found.chat_template) == (expected[TEMPLATE_KEY], expected.get(CHAT_TEMPLATE_KEY))
    if recipe == "lora":
        write_full_weights(folder, tmp_path / "made", str(base))
        export_original(folder, tmp_path / "original", str(base))
        assert said(tmp_path / "original") == expected
        # Upstream's layout takes the tokenizer of the base; its template may be another one by now.
        (tmp_path / "renewed").mkdir()
        shutil.copytree(base, tmp_path / "renewed", copy_function=shutil.copyfile, dirs_exist_ok=True)
        (tmp_path / "renewed" / "chat_template.jinja").write_text(OTHER)
        tokenizer, *_ = load_pretrained_model(str(tmp_path / "original"), str(tmp_path / "renewed"), device="cpu")
        assert tokenizer.chat_template == (WITH_BLANKS if version == "tokenizer" else OTHER)
    else:
        consolidate.main(["--src", str(folder), "--dst", str(tmp_path / "made")])
    assert said(tmp_path / "made") == expected
    tokenizer, model, _, _ = load_pretrained_model(str(tmp_path / "made"), device="cpu")
    assert tokenizer.chat_template == WITH_BLANKS
    assert model.config.conversation_template == version


@pytest.mark.parametrize("earlier", [False, True], ids=["today", "an earlier version"])
def test_a_difference_from_the_base_says_it(earlier: bool, runs: Callable[[str, str], Path], tmp_path: Path) -> None:
    target, vicuna = runs("full", "tokenizer"), str(golden_dir("llava") / "tiny-vicuna")
    if earlier:
        target = as_before(target, tmp_path / "earlier")
    delta, again = str(tmp_path / "delta"), str(tmp_path / "again")
    make_delta.main(["--base-model-path", vicuna, "--target-model-path", str(target), "--delta-path", delta])
    apply_delta.main(["--base-model-path", vicuna, "--target-model-path", again, "--delta-path", delta])
    for folder in (delta, again):
        found = trained_template(folder)
        assert found is not None
        assert (found.name, found.chat_template) == ("tokenizer", WITH_BLANKS)


def test_a_projector_alone_says_it(runs: Callable[[str, str], Path], base: Path) -> None:
    folder = runs("stage 1", "plain")
    assert (folder / "mm_projector.safetensors").is_file()
    assert said(folder) == {TEMPLATE_KEY: "plain"}
    _, model, _, _ = load_pretrained_model(str(folder), str(base), device="cpu")
    assert model.config.conversation_template == "plain"


def test_a_run_on_such_a_base_says_its_own(runs: Callable[[str, str], Path], tmp_path: Path) -> None:
    """No word of the base's chat template is left next to the name of another template."""
    train(command_line(tmp_path / "out", model_name_or_path=runs("full", "tokenizer"), version="v1", max_steps=1))
    assert said(tmp_path / "out") == {TEMPLATE_KEY: "v1"}


def test_another_template_in_the_tokenizer_is_said(
    runs: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs("full", "tokenizer"), tmp_path / "edited", copy_function=shutil.copyfile)
    (tmp_path / "edited" / "chat_template.jinja").write_text(OTHER)
    tokenizer, *_ = load_pretrained_model(str(tmp_path / "edited"), device="cpu")
    assert tokenizer.chat_template == WITH_BLANKS
    assert "another chat template than the model was trained with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "used", "line"),
    [
        ([], "tokenizer", "settings    of {base}: version tokenizer"),
        (["--version", "tokenizer"], "tokenizer", None),
        (["--version", "v1"], "v1", "settings    --version v1: {base} was trained with tokenizer"),
    ],
)
def test_the_template_of_the_base_holds_unless_a_version_is_given(
    given: list[str],
    used: str,
    line: str | None,
    runs: Callable[[str, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = runs("full", "tokenizer")
    words = command_line(tmp_path / "out", model_name_or_path=base)
    place = words.index("--version")
    args = parse_args([*words[:place], *words[place + 2 :], *given])
    assert args.model.version == used
    say_settings(args)
    out = capsys.readouterr().out
    assert ("trained with tokenizer" in out or "version" in out) == (line is not None)
    assert line is None or line.format(base=base) in out


def test_a_program_with_a_version_of_its_own_keeps_it(runs: Callable[[str, str], Path], tmp_path: Path) -> None:
    """LaVIN's prompts are none of a template."""
    words = command_line(tmp_path / "out", model_name_or_path=runs("full", "tokenizer"))
    place = words.index("--version")
    args = parse_args([*words[:place], *words[place + 2 :]], defaults={"version": "plain"})
    assert args.model.version == "plain"


def test_a_base_that_does_not_say_leaves_the_default(base: Path, tmp_path: Path) -> None:
    words = command_line(tmp_path / "out", model_name_or_path=base)
    place = words.index("--version")
    args = parse_args([*words[:place], *words[place + 2 :]])
    assert (args.model.version, args.base_template) == ("v0", None)


@pytest.mark.parametrize(("version", "used"), [([], "tokenizer"), (["--version", "v1"], "v1")])
def test_the_check_of_data_takes_the_template_of_the_base(
    version: list[str], used: str, runs: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = golden_dir("llava") / "data"
    words = [str(data / "finetune.json"), "--image_folder", str(data / "images"), "--num_workers", "0"]
    check([*words, "--tokenizer", str(runs("full", "tokenizer")), "--image_length", "4", *version])
    assert f"--version {used} " in capsys.readouterr().out
