"""The mixture of rows with and without an image: its rows, equal parameters, flags, learnt routing, and the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.experiments.common.rows import Asked, read_train
from benchmarks.experiments.common.sizes import Sizes
from benchmarks.experiments.common.steps import marker, run_steps, write_json
from benchmarks.experiments.modality import report, routing, table
from benchmarks.experiments.modality.recipe import (
    NO_ROUTING,
    SEEDS,
    Method,
    Recipe,
    TunedRun,
    mma_parameters,
    nearest_width,
    plain_parameters,
    tuned_command,
)
from benchmarks.experiments.modality.tasks import (
    KINDS,
    MODALITIES,
    TASKS,
    Scene,
    held_out_scenes,
    questions,
    text_questions,
    text_rows,
)
from benchmarks.experiments.nlvr.recipe import lora_parameters
from benchmarks.experiments.nlvr_methods.table import BASE
from llava.errors import CheckpointError, FlagError
from llava.train.arguments import parse_args
from mma import model as adapted_model
from mma.config import MmaConfig
from mma.modality import routing_table

ROOT = Path(__file__).resolve().parents[3]
SMALL = Sizes(width=16, mlp=24, layers=2, heads=2, vocabulary=32, max_length=32)
METHODS = {method.name: method for method in Recipe().methods}


TURNS = {"exist": 2, "most": 1, "count": 2}


def right_answer(words: str, question: str) -> str:
    """The answer, worked out from the words of list and question alone."""
    asked = question.rstrip("?").split()
    colours = words.split()[::2]
    if asked[0] == "How":
        return str(colours.count(asked[2]))
    if asked[0] == "Which":
        return max(set(colours), key=colours.count)
    return "Yes" if f"{asked[3]} {asked[4].rstrip('?')}" in words else "No"


def test_text_questions_have_the_right_label() -> None:
    lines = text_questions(held_out_scenes(40))
    assert [one["category"] for one in lines[:3]] == list(MODALITIES["text"])
    for one in lines:
        assert one["label"] == right_answer(*one["text"].split("\n")), one
        assert "image" not in one
    assert len({one["question_id"] for one in lines}) == len({one["text"] for one in lines}) == 120
    for task in MODALITIES["text"]:
        assert len({one["label"] for one in lines if one["category"] == task}) > 1


def test_most_is_not_asked_of_a_draw() -> None:
    draw = Scene((("blue", "circle"), ("black", "circle")))
    assert questions(draw)["most"] == {}
    assert list(questions(Scene((*draw.objects, ("blue", "square"))))["most"].values()) == ["blue"]


def test_text_rows_are_right_and_ask_of_nothing_held_out() -> None:
    held_out = held_out_scenes(200)
    rows = text_rows(300, TURNS, 1, held_out)
    lists = set()
    for row in rows:
        turns = row["conversations"]
        words, first = turns[0]["value"].split("\n")
        lists.add(words)
        asked = [first, *(turn["value"] for turn in turns[2::2])]
        assert [turn["value"] for turn in turns[1::2]] == [right_answer(words, question) for question in asked]
        assert 4 <= len(set(asked)) == len(asked) <= 5
        assert "image" not in row
    assert not lists & {scene.words for scene in held_out}
    assert rows == text_rows(300, TURNS, 1, held_out) != text_rows(300, TURNS, 2, held_out)


def test_text_rows_could_ask_of_what_is_held_out() -> None:
    """The negative control: with nothing held out, some lists are those of the test."""
    lists = {row["conversations"][0]["value"].split("\n")[0] for row in text_rows(1200, TURNS, 1, [])}
    assert lists & {scene.words for scene in held_out_scenes(100)}


WORDINGS = {
    *(
        ("exist", f"Is there a {colour} {shape}? Answer yes or no.")
        for colour in ("black", "blue", "yellow")
        for shape in ("circle", "square", "triangle")
    ),
    *(
        ("count", f"How many {colour} objects are there? Answer with a number.")
        for colour in ("black", "blue", "yellow")
    ),
    ("most", "Which colour has the most objects: black, blue or yellow?"),
}
"""The questions of the NLVR files. The base knows them as single tokens, and only if they are equal to the letter."""


def test_wordings_are_those_of_the_images() -> None:
    known = questions(Scene((("blue", "circle"),)))
    assert {(kind, question) for kind, answers in known.items() for question in answers} == WORDINGS


def test_wordings_are_those_of_the_data(nlvr_dir: Path) -> None:
    asked = {(one.task, one.question) for one in read_train(nlvr_dir / "train.json") if one.task in KINDS}
    assert asked == WORDINGS


def test_image_rows_are_of_the_kinds() -> None:
    asked = [Asked(f"images/s-{n}-0.png", task, f"{task}?", str(n)) for n in range(3) for task in (*KINDS, "verify")]
    rows = table.image_rows(asked, Recipe(rows=5), 0)
    for row in rows:
        found = {turn["value"].removeprefix("<image>\n") for turn in row["conversations"][::2]}
        assert row["image"]
        assert found == {f"{task}?" for task in KINDS}
    assert [row["id"] for row in rows] == [f"image-{number}" for number in range(5)]


def test_blind_guesses_follow_the_training_rows(tmp_path: Path) -> None:
    rows = text_rows(50, TURNS, 0, [])
    write_json(tmp_path / "train-0.json", [*rows, {**rows[0], "image": "a.png"}])
    known = questions(Scene((("blue", "circle"),)))
    asked = [Asked("", f"text {kind}", question, "?") for kind, answers in known.items() for question in answers]
    found = table.trained_about_lists(tmp_path, asked)
    assert len(found) == sum(len(row["conversations"]) // 2 for row in rows)
    assert {one.task for one in found} == set(MODALITIES["text"])


def small_model(temperature: float = 10.0, hidden: int = 6) -> Any:
    """An untrained Llama with adapters of the experiment."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SMALL.vocabulary,
            hidden_size=SMALL.width,
            intermediate_size=SMALL.mlp,
            num_hidden_layers=SMALL.layers,
            num_attention_heads=SMALL.heads,
            num_key_value_heads=SMALL.heads,
        )
    )
    config = MmaConfig(visual_adapter_type="none", adapter_dim=hidden, adapter_dropout=0.0, temperature=temperature)
    adapted_model.attach(model, config)
    return model.eval()


def test_parameter_formulas_are_those_of_the_adapters() -> None:
    added = dict(adapted_model.added_parameters(small_model()))
    assert sum(tensor.numel() for tensor in added.values()) == mma_parameters(SMALL, 6)
    plain = [tensor for name, tensor in added.items() if "conv_A" in name or "conv_B" in name]
    assert sum(tensor.numel() for tensor in plain) == plain_parameters(SMALL, 6)


def test_methods_are_of_equal_size() -> None:
    recipe = Recipe()
    wanted = lora_parameters(recipe.sizes, METHODS["lora"].width)
    for count in (
        mma_parameters(recipe.sizes, METHODS["mma"].width),
        plain_parameters(recipe.sizes, METHODS["plain"].width),
    ):
        assert abs(count / wanted - 1) < 0.01
    assert nearest_width(plain_parameters, SMALL, plain_parameters(SMALL, 6) + 1) == 6


@pytest.mark.parametrize("name", METHODS)
def test_flags_are_accepted(name: str, tmp_path: Path) -> None:
    recipe = Recipe()
    (tmp_path / "base" / "vision_tower").mkdir(parents=True)
    (tmp_path / "rows.json").write_text("[]")
    images = tmp_path / "images"
    images.mkdir()
    run = TunedRun(METHODS[name], 1, 0.01)
    command = tuned_command(recipe, run, tmp_path / "base", tmp_path / "rows.json", images, tmp_path / "out")
    args = parse_args(command[1:])
    assert args.training.freeze_mm_mlp_adapter
    assert args.model.freeze_backbone
    assert args.training.lora_enable == (name == "lora")
    assert list(args.extensions) == ([] if name == "lora" else ["mma"])
    assert args.training.learning_rate == 0.01
    if name != "lora":
        config = MmaConfig.from_dict(args.extensions["mma"])
        assert config.temperature == (recipe.temperature if name == "mma" else NO_ROUTING)
        assert (config.visual_adapter_type, config.adapter_dim) == ("none", METHODS[name].width)
        assert args.model.mm_vision_select_feature == "patch"  # LLaVA's image, not LaVIN's


def train_a_little(model: Any) -> None:
    """Adapters and routers away from where they start; the two modalities are pulled into different directions."""
    decoder = model.get_decoder()
    parameters = [parameter for _, parameter in adapted_model.added_parameters(model)]
    optimizer = torch.optim.Adam(parameters, 0.02)
    inputs = torch.randn(1, 4, SMALL.width)
    for _ in range(3):
        table_of_weights = routing_table(decoder, torch.float32)  # (layers, M, A, 2)
        loss = inputs.new_zeros(())
        for layer, weights in zip(decoder.layers, table_of_weights, strict=True):
            adapter = adapted_model.adapters(layer)[0]
            loss = loss + (adapter(inputs, weights[:1, 0]) - 1).pow(2).sum()
            loss = loss + (adapter(inputs, weights[1:, 0]) + 1).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_without_routing_both_ways_stay_one() -> None:
    """The claim behind "adapters without router"; with LaVIN's temperature the two ways part."""
    for temperature, equal in ((NO_ROUTING, True), (10.0, False)):
        model = small_model(temperature)
        train_a_little(model)
        for layer in model.get_decoder().layers:
            adapter = adapted_model.adapters(layer)[0]
            assert adapter.conv_B.weight.abs().max() > 0
            assert torch.equal(adapter.conv_B.weight, adapter.conv_D.weight) == equal
        rows = routing.layer_routing(model)
        assert len(rows) == SMALL.layers
        for row in rows:
            assert ((row["text"], row["image"], row["difference"]) == (0.5, 0.5, 0.0)) == equal


def test_difference_of_the_updates_is_that_of_the_adapters() -> None:
    """Against the update of the two modalities on random inputs, from which the biases are taken away."""
    model = small_model()
    train_a_little(model)
    adapter = adapted_model.adapters(model.get_decoder().layers[0])[0]
    weights = routing_table(model.get_decoder(), torch.float32)[0, :, 0]  # (M, 2)
    x, zero = torch.randn(1, 5, SMALL.width), torch.zeros(1, 1, SMALL.width)
    with torch.no_grad():
        for row in weights:
            expected = adapter(x, row[None]) - x - adapter(zero, row[None])
            torch.testing.assert_close((x @ routing.update_map(adapter, row)), expected, atol=1e-5, rtol=1e-5)


def test_idle_parameters_are_not_counted(tmp_path: Path) -> None:
    tensors = {"x.conv_A.weight": (2, 3, 1), "x.conv_B.weight": (3, 1, 1), "x.conv_D.weight": (3, 1, 1)}
    ones = {name: torch.ones(shape) for name, shape in tensors.items()} | {"x.expert_weights.bias": torch.ones(2)}
    save_file(ones, tmp_path / "adapters.safetensors")
    assert report.trained_parameters(tmp_path, effective=True) == 14
    assert report.trained_parameters(tmp_path, effective=False) == 9
    save_file(ones | {"x.conv_D.weight": torch.zeros(3, 1, 1)}, tmp_path / "adapters.safetensors")
    with pytest.raises(CheckpointError, match=r"conv_D\.weight' differs"):
        report.trained_parameters(tmp_path, effective=False)


def test_steps_are_named_once_need_known_steps_and_are_skipped_when_done(tmp_path: Path) -> None:
    steps = table.all_steps(Recipe(), Path("data"), tmp_path)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) == 2 + 3 * (3 * 2 + 1)
    assert {need for step in steps for need in step.needs} <= set(names)
    for step in steps:
        write_json(marker(tmp_path, step.name), {"minutes": 1.0})
    run_steps(steps, tmp_path, workers=1)  # every command would fail
    assert not (tmp_path / "logs").exists()


def test_a_base_that_is_there_is_not_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, folder = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    recipe = replace(Recipe(), rows=3, held_out=4, every=1)
    turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "Yes"}]
    write_json(data / "train.json", [{"id": "0", "image": "s-0.png", "task": "exist", "conversations": turns}])
    line = {"question_id": 1, "image": "v-0.png", "text": "Is it?", "category": "exist", "label": "No"}
    (data / "val.jsonl").write_text(json.dumps(line) + "\n")
    made: list[Path] = []
    monkeypatch.setattr(table, "prepare_base", lambda recipe, asked, folder: made.append(folder))
    write_json(marker(folder, f"train-{BASE}"), {})
    table.prepare(recipe, data, folder)
    assert not made
    assert json.loads((folder / "recipe.json").read_text()) == json.loads(json.dumps(recipe.prepared))
    assert len(json.loads((folder / "train-2.json").read_text())) == 6
    asked = table.asked_questions(folder)
    assert [one.task for one in asked] == ["exist", *(MODALITIES["text"] * 4)]
    assert [one.question for one in asked[:2]] != [one.question for one in asked[1:3]]
    assert not any("\n" in one.question for one in asked)
    with pytest.raises(FlagError, match="another recipe"):
        table.prepare(replace(recipe, rows=4), data, folder)
    table.prepare(replace(recipe, rates={}), data, folder)  # settled after the pilots
    table.prepare(recipe, data, tmp_path / "other")
    assert made == [tmp_path / "other"]


def finish(folder: Path, run: TunedRun, accuracy: float) -> None:
    """Leave what a run leaves."""
    write_json(folder / f"score-{run.name}.json", {"scores": {task: {"accuracy": accuracy} for task in TASKS}})
    for kind in ("train", "score"):
        write_json(marker(folder, f"{kind}-{run.name}"), {"cpu_minutes": 1.5})
    (folder / run.name).mkdir()
    save_file({"lora_A.weight": torch.zeros(2, 3)}, folder / run.name / "adapter.safetensors")


def test_tables_have_mean_range_and_references(tmp_path: Path) -> None:
    methods = [Method("lora", "LoRA", 4), Method("mma", "MMA", 8, 10.0)]
    for seed, accuracy in ((1, 0.3), (0, 0.1)):
        finish(tmp_path, TunedRun(methods[0], seed, 0.01), accuracy)
    results = [report.read_result(Recipe(), TunedRun(methods[0], seed, 0.01), tmp_path) for seed in (1, 0)]
    base = report.columns(dict.fromkeys(MODALITIES["image"], 0.5))
    lines = report.summary_table(methods, {"base": base}, results).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        f"| base |{' 50.0 |' * 4}{' - |' * 6}",
        f"| LoRA (2 seeds) |{' 20.0 (10.0 - 30.0) |' * 8} 6 | 1.5 |",
    ]
    assert report.seed_table(methods, results).splitlines()[2].startswith("| LoRA | 0 | 10.0 |")
    rows = [{"text": 0.5, "image": 0.25, "difference": 1.0}]
    assert report.routing_lines({2: rows}).splitlines()[2] == "| 2 | 0 | 0.500 | 0.250 | 1.000 |"


def test_the_last_loss_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "trainer_state.json", {"log_history": [{"loss": 2.0}, {"loss": 1.0}, {"train_loss": 1.5}]})
    assert report.last_loss(tmp_path) == 1.0


def test_pilots_try_every_method_at_every_rate() -> None:
    recipe = Recipe()
    names = [run.name for run in table.pilot_runs(recipe)]
    assert len(set(names)) == len(names) == len(recipe.methods) * len(recipe.candidates)
    assert {run.seed for run in table.pilot_runs(recipe)} == {SEEDS[0]}
    assert set(recipe.rates) == set(METHODS)
    assert set(recipe.rates.values()) <= set(recipe.candidates)
    assert {run.name for run in table.table_runs(recipe) if run.seed == SEEDS[0]} <= set(names)
