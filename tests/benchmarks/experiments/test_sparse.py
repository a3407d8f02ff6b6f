"""The rules that stand in for the predictor, the steps of the comparison, its tables and its figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.experiments.sparse import answer, objects, recipe, report, table, train
from benchmarks.experiments.sparse.rules import Chance, LateReading, attach_sparsity, follow, last_token_attention
from dynamic.inspection import record_decisions
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import CheckpointError, FlagError
from llava.eval.answering.loading import LoadedModel, load_model
from llava.train.arguments import parse_args
from tests.dynamic.sparse_checkpoint import write_sparse_checkpoint
from tests.golden import golden_dir

DENSE = golden_dir("llava") / "tiny-llava-v1.5"
IMAGES = golden_dir("llava") / "data" / "images"


@pytest.fixture
def dense() -> LoadedModel:
    return load_model(str(DENSE), device="cpu")


def prompts(loaded: LoadedModel, seed: int = 0) -> dict[str, Any]:
    """Two prompts of different lengths, padded on the left, with images of noise."""
    side = loaded.model.get_vision_tower().image_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 20, 30, 40, 50], [0, 0, 1, IMAGE_TOKEN_INDEX, 25, 35]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]).bool()
    return {"inputs": ids, "attention_mask": mask, "images": torch.randn(2, 3, side, side, generator=generator)}


def kept(loaded: LoadedModel) -> list[list[int]]:
    """Image tokens that the model keeps of each prompt."""
    with record_decisions(loaded.model) as log:
        loaded.model.generate(**prompts(loaded), max_new_tokens=2, do_sample=False)
    return [log.prompts[0].images(row)[0].tolist() for row in range(2)]


def test_attention_is_that_of_the_eager_layers(dense: LoadedModel) -> None:
    model = dense.model
    model.set_attn_implementation("eager")
    decoder, weights = model.get_decoder(), []
    decoder.layers[0].self_attn.register_forward_hook(lambda _, inputs, output: weights.append(output[1]))
    found = []

    def listen(layer: Any, inputs: Any, named: dict[str, Any], output: Any) -> None:
        entering = layer.input_layernorm(inputs[0])
        # The mask of left padding: 0, 1, ... positions that the second row lacks.
        length = entering.shape[1]
        mask = torch.stack([torch.arange(length) >= 0, torch.arange(length) >= 2])
        found.append(last_token_attention(layer.self_attn, entering, named["position_embeddings"], mask))

    decoder.layers[0].register_forward_hook(listen, with_kwargs=True)
    model.generate(**prompts(dense), max_new_tokens=1, do_sample=False)
    expected = weights[0].mean(dim=1)[:, -1]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("first", [0, 1])
def test_the_most_attended_tokens_are_kept(dense: LoadedModel, first: int) -> None:
    answer.obey_rule(dense.model, "attention", 0.5, 1, 0, first)
    decoder, scores = dense.model.get_decoder(), []
    layer = decoder.layers[1 if first else 0]

    def listen(below: Any, inputs: Any, named: dict[str, Any], output: Any) -> None:
        entering = layer.input_layernorm(output if first else inputs[0])
        scores.append(last_token_attention(layer.self_attn, entering, named["position_embeddings"], None))

    decoder.layers[0].register_forward_hook(listen, with_kwargs=True)
    patches = dense.patches_per_image
    first_row = kept(dense)[0]  # not padded
    best = scores[0][0, 1 : 1 + patches].topk(patches // 2).indices.sort().values
    assert first_row == best.tolist()


def test_chance_keeps_the_share_and_nothing_else(dense: LoadedModel) -> None:
    attach_sparsity(dense.model, 0.5, 1)
    rule = Chance(dense.model, 0.5, 0)
    follow(dense.model, rule)
    patches = dense.patches_per_image
    draws = [row for _ in range(30) for row in kept(dense)]
    assert {len(row) for row in draws} == {patches // 2}
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=patches) / len(draws)
    assert counts.min() > 0.2  # a half is expected; the error of 60 draws is 0.065
    dense.model.train()
    logits = Chance(dense.model, 0.2, 0)(torch.zeros(3, 4, 5))
    assert torch.allclose(logits.softmax(dim=-1)[..., 0], torch.tensor(0.2))


def test_late_text_learns_nothing_of_the_image_below(dense: LoadedModel) -> None:
    model = dense.model
    entered: list[torch.Tensor] = []
    model.get_decoder().layers[1].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))

    def run(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the second layer at the last position, and the scores of the next token."""
        entered.clear()
        output = model.generate(
            **prompts(dense, seed), max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return entered[0][:, -1], output.logits[0]

    assert not torch.allclose(run(0)[0], run(1)[0])
    LateReading(model, 1)
    (below, logits), (other_below, other_logits) = run(0), run(1)
    torch.testing.assert_close(below, other_below)
    assert not torch.allclose(logits, other_logits)


def test_late_reading_is_the_same_with_and_without_cache(dense: LoadedModel) -> None:
    def scores(use_cache: bool) -> torch.Tensor:
        output = dense.model.generate(
            **prompts(dense),
            **{"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": use_cache},
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits)

    before = scores(True)
    LateReading(dense.model, 1)
    cached = scores(True)
    torch.testing.assert_close(cached, scores(False), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, cached, atol=1e-2)


def test_rules_refuse_what_they_cannot_do(dense: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="needs --keep-rate"):
        answer.obey_rule(dense.model, "random", None, None, 0, 0)
    with pytest.raises(FlagError, match="give none"):
        answer.obey_rule(dense.model, "none", 0.5, 1, 0, 0)
    sparse = load_model(str(write_sparse_checkpoint(tmp_path / "sparse")), device="cpu")
    with pytest.raises(FlagError, match="give none"):
        answer.obey_rule(sparse.model, "random", 0.5, 1, 0, 0)
    before = kept(sparse)
    answer.obey_rule(sparse.model, "random", None, None, 1, 0)
    assert kept(sparse) != before
    (tmp_path / "rows.json").write_text("[]")
    flags = {
        "model_name_or_path": DENSE,
        "data_path": tmp_path / "rows.json",
        "output_dir": tmp_path / "out",
        "use_cpu": True,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with pytest.raises(FlagError, match="nothing is judged without --dynamic True"):
        train.main(["--judge", "random", *words])


def test_a_file_of_questions_is_answered(tmp_path: Path) -> None:
    question = {"question_id": 0, "image": "im0.png", "text": "Is it red?"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    words = ["--model-path", str(DENSE), "--question-file", str(tmp_path / "questions.jsonl"), "--temperature", "0"]
    words += ["--image-folder", str(IMAGES), "--max_new_tokens", "2", "--conv-mode", "v1", "--device", "cpu"]
    words += ["--rule", "attention", "--keep-rate", "0.5", "--sparse-layer", "1"]
    path = answer.main([*words, "--answers-file", str(tmp_path / "answers.jsonl")])
    assert json.loads(path.read_text())["question_id"] == 0


def all_runs() -> list[recipe.TrainedModel]:
    return [run for setting in recipe.SETTINGS for seed in recipe.SEEDS for run in recipe.runs_of(setting, seed)]


@pytest.mark.parametrize("run", [run for run in all_runs() if run.seed == 1], ids=lambda run: run.name)
def test_training_flags_are_accepted(run: recipe.TrainedModel, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    place = table.place_of(run.setting, data, output)
    rows = table.rows_of(run.setting, run.seed, output)
    for folder in (place.base, place.tower, place.images, rows.parent):
        folder.mkdir(parents=True, exist_ok=True)
    rows.write_text("[]")
    (command,) = table.train_step(recipe.Recipe(), run, data, output).commands
    ours, others = train.build_parser().parse_known_args(command[2:])
    args = parse_args(others, defaults={"requires_image": True})
    assert (ours.judge == "random") == (run.way == "random")
    assert ours.read_from == run.setting.read_from
    assert list(args.extensions) == ([] if run.way == "dense" else ["dynamic"])
    if args.extensions:
        assert args.extensions["dynamic"]["vision_keep_rate"] == run.keep_rate


def test_all_steps_need_known_steps() -> None:
    steps = table.all_steps(recipe.Recipe(), Path("data"), Path("out"), recipe.SETTINGS, recipe.SEEDS)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert {need for step in steps for need in step.needs} <= set(names)
    trained = {step.name.removeprefix("train-") for step in steps if step.name.startswith("train-")}
    assert {run.name for run in all_runs()} <= trained


def results() -> list[report.Result]:
    """Made up: the learned predictor loses 2 points and chance 20, more or less by seed."""
    found = []
    for run in all_runs():
        for rule, rate in table.measurements_of(run):
            accuracy = 0.8 - (0.2 if rule != "none" else 0.02 if rate < 1 else 0) + run.seed / 100
            groups = dict.fromkeys(run.setting.groups, accuracy)
            found.append(report.Result(run.setting.name, run.way, rule, rate, run.seed, groups))
    return found


def test_tables_have_every_way_and_rate() -> None:
    text = report.summary_tables(recipe.SETTINGS, results())
    for part in text.split("\n\n"):
        assert len({line.count("|") for line in part.splitlines()}) == 1
        assert "| nothing is dropped | 81.0 (80.0 - 82.0) | - |" in part
        assert "| learned predictor | - | 79.0 (78.0 - 80.0) | 79.0 (78.0 - 80.0) |" in part
        assert "| random | - | 61.0 (60.0 - 62.0) |" in part
    assert text.count("trained with random dropping") == 2  # one setting has the control, and two groups
    lines = report.seed_table(recipe.SETTINGS, results()).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert any(line.endswith("| 60.0, 61.0, 62.0 |") for line in lines)


def test_missing_seeds_are_told() -> None:
    assert report.summary([]) == "-"
    assert report.summary([50.0]) == "50.0 (1 seed)"
    assert report.summary([50.0, 60.0]) == "55.0 (50.0 - 60.0), 2 seeds"


def test_scores_are_read_by_group(tmp_path: Path) -> None:
    setting = replace(recipe.SETTINGS[0], groups={"both": ("a", "b")})
    run = recipe.TrainedModel(setting, "dense", 1.0, 2)
    scores = {"a": {"correct": 1, "n": 2}, "b": {"correct": 6, "n": 6}}
    (tmp_path / "score-nlvr-dense-2-random-0.5.json").write_text(json.dumps({"scores": scores}))
    assert report.read_result(tmp_path, run, "random", 0.5).accuracy == {"both": 7 / 8}


def test_the_figure_has_a_panel_for_each_setting(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra 'analysis'")
    report.draw(tmp_path / "one.png", recipe.SETTINGS[:1], results())
    report.draw(tmp_path / "all.png", recipe.SETTINGS, results())
    one, every = (Image.open(tmp_path / name).size for name in ("one.png", "all.png"))
    assert every == (3 * one[0], one[1])


def test_patches_with_objects_are_found() -> None:
    image = Image.new("RGB", (400, 100), (211, 211, 211))
    image.paste((0, 153, 255), (0, 0, 50, 25))  # a blue object over the first patch of each of two rows
    image.paste((10, 10, 10), (350, 88, 400, 100))  # a black one over the last patch
    assert objects.object_patches(image, 8) == {0, 8, 63}


def test_kept_patches_are_counted(tmp_path: Path) -> None:
    sparse = write_sparse_checkpoint(tmp_path / "sparse")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question_id": 0, "image": "im0.png", "text": "?"}) + "\n")
    words = ["--model-path", str(sparse), "--question-file", str(tmp_path / "questions.jsonl")]
    shares = objects.main([*words, "--image-folder", str(IMAGES), "--figure", str(tmp_path / "kept.png")])
    assert shares["kept patches"] == 0.5
    assert Image.open(tmp_path / "kept.png").size[0] > 400
    with pytest.raises(CheckpointError, match="a dense model"):
        objects.main(["--model-path", str(DENSE), *words[2:], "--image-folder", str(IMAGES)])
