"""Generator and demo from end to end at the smallest size: every artefact is there and they fit each other."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.errors import FlagError
from llava.eval.score import ALL
from playground import demo as demo_program
from playground import generate
from playground.charts import line_chart, share_bars
from playground.demo import ALLOWED_LOSS, REQUIRED_RISE, DemoError, check_rise
from playground.draw import IMAGE_SIZE
from playground.evaluate import BATCH_SIZE
from playground.families import BASE_FAMILIES, NEW_FAMILIES
from playground.generate import LOG_FILE, Playground, build
from playground.questions import BASE_QUESTIONS, NEW_QUESTIONS
from playground.recipe import RECIPE_FILE, Recipe, minimal_recipe
from playground.report import DemoRun
from playground.sparse import EXAMPLES, KEEP_RATE


@pytest.fixture(scope="module", autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def demo(folder: Path) -> DemoRun:
    flags = {"--output": folder / "data", "--results": folder / "out", "--threads": 1}
    return demo_program.main(["--minimal", *(str(part) for pair in flags.items() for part in pair)])


def test_base_is_a_complete_checkpoint(demo: DemoRun) -> None:
    place = demo.place
    config = json.loads((place.base / "config.json").read_text())
    assert Path(config["mm_vision_tower"]).name == "tiny-clip"  # found by its digest: folders can be moved
    assert len(config["mm_vision_tower_sha256"]) == 64
    assert (place.checkpoints / "tiny-clip" / "config.json").is_file()
    assert (place.checkpoints / "tiny-vicuna" / "tokenizer.model").is_file()
    assert {"tokenizer.model", "run.json", "trainer_state.json"} <= {path.name for path in place.base.iterdir()}
    weights, projector = load_file(place.base / "model.safetensors"), load_file(place.projector)
    assert len(projector) == 4
    for name, tensor in projector.items():
        assert torch.equal(weights[name], tensor)
    assert not list(place.folder.rglob(".partial*"))


def test_stages_train_what_they_say(demo: DemoRun) -> None:
    checkpoints = demo.place.checkpoints
    untrained = checkpoints / generate.UNTRAINED
    first = load_file(untrained / "tiny-vicuna" / "model.safetensors")
    after_tower = load_file(checkpoints / "tiny-vicuna" / "model.safetensors")
    after_full = load_file(demo.place.base / "model.safetensors")
    assert first.keys() == after_tower.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], after_tower[name])
    assert not torch.equal(after_tower[name], after_full[name])
    tower = load_file(untrained / "tiny-clip" / "model.safetensors")
    trained = load_file(checkpoints / "tiny-clip" / "model.safetensors")
    assert tower.keys() == trained.keys()
    assert any(not torch.equal(tower[key], trained[key]) for key in tower)
    assert {path.name for path in (checkpoints / generate.PRETRAINED).glob("*.safetensors")} == {
        "mm_projector.safetensors"
    }


def test_the_published_script_made_the_checkpoint(demo: DemoRun) -> None:
    arguments = json.loads((demo.tuned / "run.json").read_text())["arguments"]
    assert arguments["options"]["hydralora"]["llm_moe"] is True
    assert arguments["options"]["hydralora"]["llm_moe_num_experts"] == 3
    assert arguments["data"]["data_path"][0].endswith("new_train.json")
    assert {"adapter_model.safetensors", "mm_projector.safetensors", "extensions/hydralora/model.safetensors"} == set(
        demo.trained
    )
    assert all(count > 0 for count in demo.trained.values())


def test_scores_cover_all_families(demo: DemoRun, folder: Path) -> None:
    assert set(demo.new.by_family()) == {*NEW_FAMILIES, ALL}
    assert set(demo.base.by_family()) == {*BASE_FAMILIES, ALL}
    for file in (NEW_QUESTIONS, BASE_QUESTIONS):
        asked = (demo.place.data / file).read_text().splitlines()
        for answers in ("answers-before", "answers-after"):
            assert len((folder / "out" / answers / file).read_text().splitlines()) == len(asked) > 0


def test_expert_shares_are_shares(demo: DemoRun) -> None:
    assert set(demo.expert_shares) == set(NEW_FAMILIES)
    for layers in demo.expert_shares.values():
        assert len(layers) == demo.place.recipe.sizes.layers
        for experts in layers:
            assert len(experts) == 3
            assert sum(experts) == pytest.approx(1, abs=1e-5)


def test_the_sparse_model_is_the_base_with_a_predictor(demo: DemoRun) -> None:
    sparse = demo.sparse
    arguments = json.loads((sparse.tuned / "run.json").read_text())["arguments"]
    assert arguments["data"]["data_path"][0].endswith("base_train.json")
    assert arguments["options"]["dynamic"]["vision_keep_rate"] == KEEP_RATE
    weights = load_file(sparse.tuned / "extensions" / "dynamic" / "model.safetensors")
    assert {name.split(".")[1] for name in weights} == {"image_score_predictor"}
    assert set(sparse.sparse_result.scores) == {*BASE_FAMILIES, ALL}
    assert sparse.dense_result is demo.base.before
    assert sparse.sparse_result.answers.keys() == sparse.dense_result.answers.keys()


def test_dropping_saves_what_it_drops(demo: DemoRun) -> None:
    sparse, sizes = demo.sparse, demo.place.recipe.sizes
    assert sparse.patches_kept == pytest.approx(4 / 9)
    assert 0 <= sparse.things_kept <= 1
    assert min(sparse.dense_cost.milliseconds, sparse.sparse_cost.milliseconds, sparse.speedup) > 0
    questions = min(BATCH_SIZE, sum(bool(question.images) for question in sparse.dense_result.questions))
    # Five of nine patches are missing in every layer but the first: keys and values of 4 bytes a number.
    saved = (sizes.layers - 1) * 2 * 4 * sizes.width * 5 * questions
    assert sparse.dense_cost.cache_bytes - sparse.sparse_cost.cache_bytes == saved
    assert sparse.cache_ratio > 1


def test_examples_show_what_was_kept(demo: DemoRun) -> None:
    assert 0 < len(demo.sparse.examples) <= EXAMPLES
    for example in demo.sparse.examples:
        assert example.image.image.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert example.image.grid == (3, 3)
        assert len(example.image.kept) == 4
        assert example.answer == demo.sparse.sparse_result.answers[example.question.question_id]


def test_report_needs_nothing_from_outside(demo: DemoRun, folder: Path) -> None:
    page = (folder / "out" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for family in NEW_FAMILIES:
        assert family in page
    assert page.count("<polyline") >= 7  # five runs, and the balance loss and the keep-rate loss of the last two
    assert page.count('class="kept"') == len(demo.sparse.examples)
    record = json.loads((folder / "out" / "demo.json").read_text())
    assert record["new"][ALL][0]["accuracy"] == demo.new.before.accuracy
    assert record["trained_parameters"] == demo.trained
    assert record["sparse"]["prefill_speedup"] == demo.sparse.speedup


def test_a_finished_playground_is_reused_and_other_recipes_are_not(
    demo: DemoRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []
    monkeypatch.setattr(generate, "_run", lambda step, log: made.append(step.name) or 0.0)
    again = build(demo.place.folder, minimal_recipe(), threads=1)
    assert made == []
    assert again.seconds == demo.place.seconds
    assert capsys.readouterr().out.count("reused") == 5
    record = (demo.place.folder / RECIPE_FILE).read_text()
    for change in ({"recipe": minimal_recipe(seed=1)}, {"threads": 2}, {"fresh": True}):
        made.clear()
        build(demo.place.folder, **{"recipe": minimal_recipe(), "threads": 1} | change)
        assert made == ["data", "untrained", "tower", "projector", "full"]
        (demo.place.folder / RECIPE_FILE).write_text(record)


def test_an_interrupted_build_goes_on_where_it_stopped(demo: DemoRun, monkeypatch: pytest.MonkeyPatch) -> None:
    path = demo.place.folder / RECIPE_FILE
    before = path.read_text()
    record = json.loads(before)
    del record["seconds"]["projector"], record["seconds"]["full"]
    path.write_text(json.dumps(record))
    made: list[str] = []
    monkeypatch.setattr(generate, "_run", lambda step, log: made.append(step.name) or 0.0)
    build(demo.place.folder, minimal_recipe(), threads=1)
    assert made == ["projector", "full"]
    path.write_text(before)


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    theirs = tmp_path / "checkpoints" / "tiny-llava"
    theirs.mkdir(parents=True)
    with pytest.raises(FlagError, match="tiny-llava exists"):
        build(tmp_path, minimal_recipe())
    assert theirs.is_dir()
    assert not (tmp_path / LOG_FILE).exists()


def test_fingerprint_covers_the_recipe() -> None:
    assert Recipe().fingerprint() == Recipe().fingerprint()
    others = [Recipe(seed=1), Recipe(base_rows=7), minimal_recipe()]
    assert len({recipe.fingerprint() for recipe in (Recipe(), *others)}) == 4
    tuned = dataclasses.replace(Recipe(), tune=minimal_recipe().tune)
    assert tuned.fingerprint() == Recipe().fingerprint()


def test_a_demo_that_does_not_learn_fails(demo: DemoRun) -> None:
    assert demo.new.rise < REQUIRED_RISE
    with pytest.raises(DemoError, match="less than 25"):
        check_rise(demo)


def test_a_sparse_model_that_has_forgotten_fails(demo: DemoRun) -> None:
    knows = dataclasses.replace(demo.sparse.sparse_result.scores[ALL], accuracy=0.9)
    knowing = dataclasses.replace(demo.sparse.dense_result, scores={ALL: knows})
    sparse = dataclasses.replace(demo.sparse, dense_result=knowing)
    assert sparse.loss > ALLOWED_LOSS
    with pytest.raises(DemoError, match="more than 15"):
        check_rise(dataclasses.replace(demo, sparse=sparse))


def test_charts_place_what_they_are_given() -> None:
    chart = line_chart({"lm": [(0, 4.0), (10, 1.0)]}, x_label="updates")
    assert 'points="42.0,12.0 408.0,138.0"' in chart
    bars = share_bars({"more": [0.25, 0.75]})
    assert "25 %" in bars
    assert "75 %" in bars


def test_playground_paths() -> None:
    place = Playground(Path("x"), Recipe(), {})
    assert place.base == Path("x/checkpoints/tiny-llava")
    assert place.images == Path("x/tiny/images")
