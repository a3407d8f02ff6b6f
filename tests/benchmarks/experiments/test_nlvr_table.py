"""Parameter matching, the order and continuation of steps, the tokenizer, and what is written into the document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from benchmarks.experiments.common import tiny
from benchmarks.experiments.common.report import DocumentError, command_block, fill, fill_document
from benchmarks.experiments.common.rows import Asked
from benchmarks.experiments.common.sizes import Sizes
from benchmarks.experiments.common.steps import Step, StepError, marker, run_steps
from benchmarks.experiments.nlvr import report, table
from benchmarks.experiments.nlvr.recipe import Recipe, hydra_parameters, lora_parameters, matching_lora_rank
from llava.train.arguments import parse_args


def test_lora_rank_matches_within_two_per_cent() -> None:
    recipe = Recipe()
    hydra = hydra_parameters(recipe.sizes, recipe.rank, recipe.experts)
    lora = lora_parameters(recipe.sizes, matching_lora_rank(recipe.sizes, recipe.rank, recipe.experts))
    assert abs(lora / hydra - 1) < 0.02


def test_parameter_formulas_on_a_small_case() -> None:
    sizes = Sizes(width=2, mlp=3, layers=1)
    assert lora_parameters(sizes, 1) == 4 * (2 + 2) + 3 * (2 + 3)
    assert hydra_parameters(sizes, 1, 2) == 4 * (2 + 2) + (2 + 2 + 3) + 2 * (3 + 3 + 2) + (2 * 2 + 2)


@pytest.mark.parametrize("method", ["base", "lora", "hydra"])
def test_training_flags_are_accepted(method: str, tmp_path: Path) -> None:
    data, folder = tmp_path / "data", tmp_path / "out"
    for path in (data, folder / "base-1" / "vision_tower", folder / "start-1" / "llm", folder / "start-1" / "tower"):
        path.mkdir(parents=True)
    for kind in ("base", "tuned"):
        (folder / f"{kind}-1.json").write_text("[]")
    step = table.training_step(Recipe(), method, 1, data, folder)
    args = parse_args(step.commands[0][1:])
    assert args.training.seed == 1
    assert args.model.unfreeze_mm_vision_tower == (method == "base")
    assert args.training.lora_enable == (method != "base")
    assert list(args.extensions) == (["hydralora"] if method == "hydra" else [])


def test_all_steps_need_known_steps() -> None:
    steps = table.all_steps(Recipe(), Path("data"), Path("out"))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) == 18
    assert {need for step in steps for need in step.needs} <= set(names)


def append(path: Path, word: str) -> tuple[str, ...]:
    return ("-c", f"open({str(path)!r}, 'a').write('{word} ')")


def test_steps_run_in_order_and_once(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    steps = [
        Step("second", (append(notes, "b"),), ("first",)),
        Step("first", (append(notes, "a"),)),
    ]
    run_steps(steps, tmp_path, workers=2)
    run_steps(steps, tmp_path, workers=2)
    assert notes.read_text().split() == ["a", "b"]
    assert json.loads(marker(tmp_path, "first").read_text())["minutes"] > 0


def test_a_failed_step_is_named_and_runs_again(tmp_path: Path) -> None:
    switch, notes = tmp_path / "switch", tmp_path / "notes"
    step = Step("one", (("-c", f"open({str(switch)!r})"), append(notes, "a")))
    with pytest.raises(StepError, match=r"one: .*one\.log"):
        run_steps([step], tmp_path, workers=1)
    assert not marker(tmp_path, "one").exists()
    switch.touch()
    run_steps([step], tmp_path, workers=1)
    assert notes.read_text().split() == ["a"]
    assert json.loads(marker(tmp_path, "one").read_text())["resumed"]


def test_unknown_and_circular_needs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not in the list"):
        run_steps([Step("a", (), ("b",))], tmp_path, workers=1)
    with pytest.raises(ValueError, match="wait for each other"):
        run_steps([Step("a", (), ("b",)), Step("b", (), ("a",))], tmp_path, workers=1)


def test_trained_parameters_leave_resume_states_out(tmp_path: Path) -> None:
    for name, size in (("model", 6), ("checkpoint-5/model", 100), ("extensions/x/model", 4)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.zeros(2, size // 2)}, tmp_path / f"{name}.safetensors")
    assert report.trained_parameters(tmp_path) == 10


def result(method: str, seed: int, value: float) -> report.Result:
    return report.Result(method, seed, dict.fromkeys(report.TASKS, value), 1234, 2.0)


def test_summary_has_mean_and_range() -> None:
    baselines = {"majority answer": dict.fromkeys(report.TASKS, 0.5)}
    text = report.summary_table(baselines, [result("lora", seed, value) for seed, value in enumerate((0.7, 0.8, 0.9))])
    assert "| majority answer | 50.0 |" in text
    assert "| LoRA (3 seeds) | 80.0 (70.0 - 90.0) |" in text
    assert "1,234 | 2.0 |" in text
    assert "HydraLoRA" not in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_seed_table_is_rectangular() -> None:
    text = report.seed_table([result("hydra", 1, 0.5), result("base", 0, 0.25)])
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert text.splitlines()[2].startswith("| base | 0 | 25.0")


def test_fill_replaces_only_what_is_marked() -> None:
    text = "a\n<!-- x begin -->\nold\n<!-- x end -->\nb\n"
    filled = fill(text, "x", "new")
    assert filled == "a\n<!-- x begin -->\n\nnew\n\n<!-- x end -->\nb\n"
    assert fill(filled, "x", "new") == filled
    with pytest.raises(DocumentError, match="y begin"):
        fill(text, "y", "new")


def test_a_document_is_filled_whole_or_not_at_all(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    text = "<!-- x begin -->\n<!-- x end -->\n<!-- y begin -->\n<!-- y end -->\n"
    document.write_text(text)
    with pytest.raises(DocumentError, match="z begin"):
        fill_document(document, {"x": "1", "z": "2"})
    assert document.read_text() == text
    fill_document(document, {"x": "1", "y": "2"})
    assert document.read_text() == fill(fill(text, "x", "1"), "y", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_commands_are_one_option_a_line() -> None:
    block = command_block([("x.py", "--a", "1", "--b", "2 3")])
    assert block == "```bash\npython x.py \\\n    --a 1 \\\n    --b '2 3'\n```"


def test_tokenizer_makes_questions_single_pieces(tmp_path: Path) -> None:
    """And no piece reaches from a question into its answer, or from an answer into the next turn."""
    questions = [f"How many {colour} objects are there?" for colour in ("red", "blue")]
    asked = [Asked("i-0.png", "count", question, "3") for question in questions * 300]
    model = tiny.train_tokenizer(tiny.tokenizer_text(asked, "v1"), 480)
    tiny.save_tokenizer(tmp_path, model, 128)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    prompt = "How▁many▁red▁objects▁are▁there?▁ASSISTANT:"
    assert pieces.encode(f"\n{questions[0]} ASSISTANT: 3", out_type=str)[-2:] == [prompt, "▁3"]
    later = pieces.encode(f"USER: {questions[0]} ASSISTANT: 3", out_type=str)
    assert later == ["▁", "USER:", "▁" + prompt, "▁3"]
