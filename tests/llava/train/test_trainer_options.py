"""Options of transformers that need support here do what they say: label smoothing, noise, order by length."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother, get_length_grouped_indices

from hydralora.finetune import build_run as build_text_run
from hydralora.finetune import main as finetune
from hydralora.text.arguments import parse_args as parse_text
from llava.model.loss import LossReduction, language_model_loss
from llava.runtime.trainer_options.lengths import length_order, lengths_of
from llava.runtime.trainer_options.noise import text_positions, with_noise
from llava.runtime.trainer_options.smoothing import smoothing_term
from llava.segments import MultimodalInputs, Segments, Span
from llava.train import llava_trainer
from llava.train.arguments import parse_args
from llava.train.train import build_run
from llava.train.train import main as train
from mma.lavin.train import main as train_lavin
from playground.tiny import build_tiny
from tests.llava.train.test_training import command_line, losses
from tests.mma.lavin.lavin_files import save_lavin_files, tiny_words
from tests.reliability.test_training_numbers import finetune_words

GENERATOR = torch.Generator().manual_seed(3)
LOGITS = torch.randn(2, 7, 11, generator=GENERATOR)
LABELS = torch.tensor([[-100, -100, 4, 5, 6, -100, 1], [-100, 3, 2, -100, -100, -100, -100]])


# Label smoothing


@pytest.mark.parametrize("items", [None, 13])
def test_smoothing_is_that_of_transformers(items: int | None) -> None:
    expected = LabelSmoother(epsilon=0.2)({"logits": LOGITS}, LABELS, shift_labels=True)
    targets = int((LABELS[:, 1:] != -100).sum())
    scale = 1 if items is None else targets / items
    found = language_model_loss(LOGITS, LABELS, LossReduction.TARGET, items, smoothing=0.2)
    torch.testing.assert_close(found, expected * scale)
    plain = language_model_loss(LOGITS, LABELS, LossReduction.TARGET, items)
    torch.testing.assert_close(plain + smoothing_term(LOGITS, LABELS, 0.2, items), expected * scale)
    assert not torch.isclose(plain, found)


def llava_loss(tmp_path: Path, name: str, **options: Any) -> tuple[float, float]:
    """Loss of the first batch while training, and while evaluating."""
    run = build_run(parse_args(command_line(tmp_path / name, **options)))
    batch = run.trainer.data_collator([run.dataset[0], run.dataset[1]])
    found = []
    for training in (True, False):
        run.model.train(training)
        with torch.no_grad():
            found.append(float(run.trainer.compute_loss(run.model, batch)))
    return found[0], found[1]


def test_a_llava_is_smoothed_while_training_alone(tmp_path: Path) -> None:
    plain, smoothed = (llava_loss(tmp_path, f"s{each}", label_smoothing_factor=each) for each in (0, 0.3))
    assert plain[0] == plain[1] == smoothed[1]
    assert smoothed[0] != plain[0]


@pytest.fixture(scope="module")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("base")).language_model


@pytest.mark.parametrize("items", [None, 9])
def test_a_text_model_is_smoothed_as_by_transformers(text_base: Path, tmp_path: Path, items: int | None) -> None:
    """The labels stay with the model, whose router needs to know what the answer is."""
    words = finetune_words(
        text_base, tmp_path / "data", tmp_path / "out", routing="sequence", label_smoothing_factor=0.2
    )
    run = build_text_run(parse_text(words))
    batch = run.trainer.data_collator([run.trainer.train_dataset[0], run.trainer.train_dataset[1]])
    given = []
    handle = run.model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs.get("labels") is not None), with_kwargs=True
    )
    run.model.train()
    run.model.active_peft_config.lora_dropout = 0
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        loss, outputs = run.trainer.compute_loss(run.model, dict(batch), True, items)
    handle.remove()
    expected = LabelSmoother(epsilon=0.2)({"logits": outputs["logits"]}, batch["labels"], shift_labels=True)
    targets = int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(loss, expected * (1 if items is None else targets / items))
    assert given == [True]


# NEFTune


def test_noise_is_on_text_and_as_large_as_the_paper_says() -> None:
    spans = Segments(Span(0, 2), (Span(2, 5),), Span(5, 6), Span(5, 6), Span(6, 8))
    mask = torch.tensor([[True] * 8, [True] * 4 + [False] * 4])
    embeds = torch.zeros(2, 8, 16)
    none = Segments(Span(0, 0), (), Span(0, 2), Span(0, 2), Span(2, 4))
    noised = text_positions(MultimodalInputs(embeds, None, mask, None, [spans, none]))
    assert noised.tolist() == [[True, True, False, False, False, True, True, True], [True] * 4 + [False] * 4]
    torch.manual_seed(0)
    found = with_noise(embeds, noised, alpha=5.0)
    for row, count in ((0, 5), (1, 4)):
        largest = 5.0 / (count * 16) ** 0.5
        values = found[row][noised[row]]
        assert largest * 0.9 < float(values.abs().max()) <= largest
        assert bool((found[row][~noised[row]] == 0).all())
    assert with_noise(embeds.half(), noised, 5.0).dtype is torch.float16


def test_noise_in_half_precision_has_room_for_long_rows() -> None:
    long = torch.zeros(1, 40, 2048, dtype=torch.float16)  # 81,920 values are more than float16 counts
    assert float(with_noise(long, torch.ones(1, 40, dtype=torch.bool), 5.0).abs().max()) > 0


def test_noise_of_a_llava_is_there_while_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {}
    for name, options in {
        "plain": {},
        "noise": {"neftune_noise_alpha": 5},
        "again": {"neftune_noise_alpha": 5},
    }.items():
        train(command_line(tmp_path / name, **options))
        runs[name] = losses(tmp_path / name)
    assert runs["noise"] == runs["again"] != runs["plain"]
    run = build_run(parse_args(command_line(tmp_path / "other", neftune_noise_alpha=5)))
    inside: list[Any] = []
    monkeypatch.setattr(
        llava_trainer.LLaVATrainer.__mro__[1], "train", lambda self: inside.append(self.model.noise_alpha) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run.trainer.train()
    assert (inside, run.model.noise_alpha) == ([5.0], None)
    assert run.trainer.neftune_noise_alpha is None  # transformers' hook sees a flat list of ids and fails
    batch = run.trainer.data_collator([run.dataset[0]])
    run.model.train()
    run.model.noise_alpha = 5.0
    with torch.no_grad():
        first, second = (float(run.model(**batch).loss) for _ in range(2))
        run.model.eval()
        third, fourth = (float(run.model(**batch).loss) for _ in range(2))
    assert first != second
    assert third == fourth


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_noise_of_a_text_model(text_base: Path, tmp_path: Path) -> None:
    found = {}
    for name, options in {"plain": {}, "noise": {"neftune_noise_alpha": 5}}.items():
        out = tmp_path / name
        adapter = finetune(finetune_words(text_base, tmp_path / "data", out, max_steps=2, **options))
        found[name] = losses(out), names_in(adapter)
    assert found["plain"][0] != found["noise"][0]
    assert found["plain"][1] == found["noise"][1]


# The order by length


def test_the_order_is_that_of_transformers_and_needs_no_row() -> None:
    counted = [5, 1, 9, 2, 2, 7, 3, 8, 4, 6]
    torch.manual_seed(7)
    expected = get_length_grouped_indices(counted, 2)
    torch.manual_seed(7)
    assert length_order(counted, 2)() == expected
    with pytest.raises(ValueError, match="cannot be counted before the run"):
        lengths_of(SimpleNamespace())


def orders(trainer: Any) -> list[list[int]]:
    sampler = trainer._get_train_sampler()
    found = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def test_a_llava_opens_no_image_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(parse_args(command_line(tmp_path / "out", train_sampling_strategy="group_by_length")))
    monkeypatch.setattr(type(run.dataset), "__getitem__", lambda *_: pytest.fail("a row was prepared"))
    first, second, again = orders(run.trainer)
    assert first == again != second
    assert sorted(first) == list(range(len(run.dataset)))
    lengths = run.dataset.lengths
    assert lengths[first[0]] == max(lengths)


def test_a_text_model_orders_by_tokens(text_base: Path, tmp_path: Path) -> None:
    words = finetune_words(text_base, tmp_path / "data", tmp_path / "out", train_sampling_strategy="group_by_length")
    run = build_text_run(parse_text(words))
    assert run.trainer.train_dataset.lengths == [len(each.input_ids) for each in run.trainer.train_dataset]
    first, second, again = orders(run.trainer)
    assert first == again != second


NEEDING_SUPPORT = {"group_by_length": True, "neftune_noise_alpha": 5, "label_smoothing_factor": 0.1}


def words_of(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_a_llava_resumes_exactly(tmp_path: Path) -> None:
    words = [*command_line(tmp_path / "whole", max_steps=4, save_steps=2), *words_of(NEEDING_SUPPORT)]
    train(words)
    resumed = [word.replace("whole", "half") for word in words]
    train([*resumed, "--max_steps", "4", "--save_total_limit", "5"])
    for path in (tmp_path / "half").iterdir():
        if path.name not in ("checkpoint-2",):
            _remove(path)
    train([*resumed, "--save_total_limit", "5"])
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_text_model_resumes_exactly(text_base: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("whole", "half"):
        words = finetune_words(text_base, tmp_path / "data", tmp_path / name, save_steps=2)
        finetune([*words, *words_of(NEEDING_SUPPORT)])
        if name == "half":
            for path in (tmp_path / name).iterdir():
                if path.name not in ("checkpoint-2", "run.json"):
                    _remove(path)
            finetune([*words, *words_of(NEEDING_SUPPORT)])
        found[name] = losses(tmp_path / name)
    assert found["half"] == found["whole"]


def test_lavin_has_all_of_it(tmp_path: Path) -> None:
    files = save_lavin_files(tmp_path / "files")
    found = []
    for options in ({}, NEEDING_SUPPORT):
        out = tmp_path / f"out{len(options)}"
        train_lavin(tiny_words(files, out, "--report_to", "none", "--max_steps", "2", *words_of(options)))
        found.append(losses(out))
        assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    assert found[0] != found[1]
