"""Passes with a loss on any batch: other numbers of images, text alone, padding on either side, empty answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dynamic.training
from dynamic.config import kept_count
from dynamic.extension import DynamicExtension
from dynamic.layer import gumbel_noise
from llava.errors import FlagError
from llava.segments import MultimodalInputs, Segments, Span
from tests.checkpointed import keep_activations
from tests.dynamic.golden_model import arch, golden_model
from tests.dynamic.test_training_golden import LIKE_ORIGINAL, Recorded, golden_pass
from tests.golden import load_case

SPARSE = arch()["sparse_config"]
WIDTH = 64

# Lengths of: system text, each image, instruction, answer.
ONE_IMAGE = (3, [16], 9, 6)
SHORT_IMAGE = (5, [9], 4, 5)
TWO_IMAGES = (2, [16, 9], 8, 7)
TEXT_ONLY = (0, [], 12, 8)
NO_ANSWER = (3, [16], 9, 0)
SAMPLES = {"one": ONE_IMAGE, "short": SHORT_IMAGE, "two": TWO_IMAGES, "text": TEXT_ONLY, "unanswered": NO_ANSWER}
Shape = tuple[int, list[int], int, int]


def length_of(shape: Shape) -> int:
    return shape[0] + sum(shape[1]) + shape[2] + shape[3]


def segments_of(shape: Shape, offset: int) -> Segments:
    system, sizes, instruct, answer = shape
    place, images = offset + system, []
    for size in sizes:
        images.append(Span(place, place + size))
        place += size
    asked = Span(place, place + instruct)
    return Segments(Span(offset, offset + system), tuple(images), asked, asked, Span(asked.end, asked.end + answer))


def batch_of(names: list[str], side: str = "right", total: int | None = None) -> MultimodalInputs:
    """A batch of random embeddings; each sample has the same ones in every batch."""
    shapes = [SAMPLES[name] for name in names]
    longest = max(map(length_of, shapes)) if total is None else total
    embeds = torch.zeros(len(shapes), longest, WIDTH)
    labels = torch.full((len(shapes), longest), -100)
    mask = torch.zeros(len(shapes), longest, dtype=torch.bool)
    positions = torch.zeros(len(shapes), longest, dtype=torch.long)
    segments = []
    for row, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        generator = torch.Generator().manual_seed(sorted(SAMPLES).index(name))
        length = length_of(shape)
        start = longest - length if side == "left" else 0
        here = slice(start, start + length)
        embeds[row, here] = 0.3 * torch.randn(length, WIDTH, generator=generator)
        mask[row, here], positions[row, here] = True, torch.arange(length)
        segments.append(segments_of(shape, start))
        answer = slice(*segments[-1].answer)
        labels[row, answer] = torch.randint(3, 128, (shape[3],), generator=generator)
    return MultimodalInputs(embeds, labels, mask, positions, segments)


@pytest.fixture(scope="module")
def built(golden_tower: Path) -> tuple[Any, DynamicExtension]:
    return golden_model(golden_tower, SPARSE)


@pytest.fixture
def host(built: tuple[Any, DynamicExtension]) -> Any:
    """The golden model, in training mode, without gradients left by another test."""
    model, extension = built
    model.zero_grad(set_to_none=True)
    extension._schedule(model).tau = 0.7
    yield model.train()
    keep_activations(model)


def run(host: Any, inputs: MultimodalInputs, **attention: Any) -> Recorded:
    extension = next(iter(host.extensions)).extension
    return Recorded(host, extension, inputs, **attention)


def constant_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise for the k-th token of every span, whatever the batch: samples can be compared across batches."""

    def draw(shape: torch.Size, device: Any = None) -> Tensor:
        torch.manual_seed(5)
        return gumbel_noise((1, 64, *shape[2:]))[:, : shape[1]].expand(shape)

    monkeypatch.setattr(dynamic.training, "gumbel_noise", draw)


def real_logits(recorded: Recorded, row: int) -> Tensor:
    return recorded.output.logits[row][recorded.inputs.attention_mask[row]]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_each_sample_of_a_batch_is_treated_as_alone(
    host: Any, side: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant_noise(monkeypatch)
    host.train(mode == "train")
    names = list(SAMPLES)
    together = run(host, batch_of(names, side))
    sums = dict.fromkeys(together.losses, 0.0)
    for row, name in enumerate(names):
        alone = run(host, batch_of([name], side))
        # Measured: 1.4e-5 at logits up to 9.
        torch.testing.assert_close(real_logits(together, row), real_logits(alone, 0), rtol=1e-4, atol=1e-4)
        for loss, value in alone.losses.items():
            sums[loss] += float(value.detach()) / len(names)
    assert sums.keys() == {"dynamic/image", "dynamic/output_text", "dynamic/instruct"}
    for loss, value in together.losses.items():
        assert float(value.detach()) == pytest.approx(sums[loss], rel=1e-5)


def test_dropped_tokens_matter_and_text_before_the_image_does_not_change(host: Any) -> None:
    inputs = batch_of(["one"])
    masked = run(host, inputs)
    dense = host(
        inputs_embeds=inputs.inputs_embeds, segments=None, attention_mask=inputs.attention_mask, use_cache=False
    )
    start = inputs.segments[0].images[0].start
    torch.testing.assert_close(masked.output.logits[0, :start], dense.logits[0, :start], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(masked.output.logits[0, start:], dense.logits[0, start:], atol=1e-2)


@pytest.mark.parametrize("names", [["text"], ["text", "one"], ["unanswered"], ["text", "unanswered"]])
def test_every_predictor_takes_part_in_every_batch(host: Any, names: list[str]) -> None:
    """Otherwise a process with such a batch would wait for the others for ever."""
    called: list[str] = []
    predictors = {name: module for name, module in host.get_decoder().named_children() if name.endswith("_predictor")}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name)) for name, module in predictors.items()
    ]
    recorded = run(host, batch_of(names))
    for hook in hooks:
        hook.remove()
    assert called == ["image_score_predictor", "output_text_score_predictor", "instruct_score_predictor"]
    assert bool(torch.isfinite(recorded.total)) or "text" not in names  # without any target the LM loss is no number
    sum(recorded.losses.values()).backward()
    for name, module in predictors.items():
        for weight in module.parameters():
            assert weight.grad is not None, name
            assert bool(weight.grad.isfinite().all()), name
    image_gradient = sum(float(w.grad.abs().sum()) for w in predictors["image_score_predictor"].parameters())
    assert (image_gradient > 0) == any(SAMPLES[name][1] for name in names)


def test_short_answers_are_kept_whole_and_have_no_loss(host: Any) -> None:
    recorded = run(host, batch_of(["short"]))  # its instruction has 4 tokens, of which 8 are asked for
    assert bool((recorded.decisions["instruct"].kept == 1).all())
    assert not recorded.losses["dynamic/instruct"].any()
    assert not recorded.decisions["instruct"].judged.any()


def test_evaluation_decides_as_inference(host: Any, built: tuple[Any, DynamicExtension]) -> None:
    """The logits of the answer are those of a prefill that really drops, and the loss is the same every time."""
    host.eval()
    inputs = batch_of(["one"])
    inputs.labels[:] = -100
    end = inputs.segments[0].instruct.end
    inputs.segments[0] = replace(inputs.segments[0], answer=Span(end, end))
    prompt = MultimodalInputs(
        inputs.inputs_embeds[:, :end], None, inputs.attention_mask[:, :end], inputs.position_ids[:, :end],
        inputs.segments,
    )  # fmt: skip
    masked = run(host, replace(prompt, labels=inputs.labels[:, :end]))
    host.extensions.on_inputs(host, prompt)
    with torch.no_grad():
        dropped = host(
            inputs_embeds=prompt.inputs_embeds, attention_mask=prompt.attention_mask, segments=prompt.segments
        )
    kept = masked.policy[0].bool()
    image = inputs.segments[0].images[0]
    assert int(kept[slice(*image)].sum()) == kept_count(16, SPARSE["vision_keep_rate"])
    assert dropped.logits.shape[1] == int(kept.sum()) < end
    torch.testing.assert_close(masked.output.logits[:, kept], dropped.logits, rtol=1e-4, atol=1e-4)
    again = run(host, replace(prompt, labels=inputs.labels[:, :end]))
    assert torch.equal(again.output.logits, masked.output.logits)


@pytest.mark.parametrize("name", ["tau1_instruct", "e2e"])
def test_checkpointing_changes_nothing(name: str, golden_tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for checkpointing in (False, True):
        _, _, model, recorded = golden_pass(name, golden_tower, monkeypatch, checkpointing=checkpointing)
        assert model.model.layers[3].gradient_checkpointing is checkpointing
        recorded.total.backward()
        found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        gradients.append(found | {"inputs": recorded.inputs.inputs_embeds.grad, "total": recorded.total.detach()})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("image_score_predictor" in name for name in gradients[0])
    for key, value in gradients[0].items():
        assert torch.equal(value, gradients[1][key]), key


def test_every_sample_has_its_own_image_range(golden_tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original drops where the first sample's image lies, in every sample."""
    _, tensors, _, recorded = golden_pass("quirk_misaligned", golden_tower, monkeypatch, **LIKE_ORIGINAL)
    decision = recorded.decisions["image"]
    torch.testing.assert_close(decision.kept, tensors["out/image_mask"], rtol=0, atol=1e-6)
    places = [segment.images[0] for segment in recorded.inputs.segments]
    assert len({place.start for place in places}) > 1, "the case must have images at different places"
    for row, place in enumerate(places):
        torch.testing.assert_close(recorded.policy[row, slice(*place)], decision.kept[row])
    torch.testing.assert_close(recorded.policy[0], tensors["out/policy"][0, :, 0], rtol=0, atol=1e-6)
    assert not torch.allclose(recorded.policy[1], tensors["out/policy"][1, :, 0], atol=0.5)


def test_text_alone_does_not_switch_the_batch_off(golden_tower: Path) -> None:
    """The original skips all sparsification of a batch with a sample without image."""
    case, tensors = load_case("dynamic", "train_quirk_text_only_sample")
    model, _ = golden_model(golden_tower, case["sparse_config"])
    model.train()
    names = ("input_ids", "attention_mask", "labels", "images")
    output = model(**{name: tensors[f"in/{name}"] for name in names})
    assert output.losses.keys() == {"lm", "dynamic/image", "dynamic/output_text"}
    assert float(output.losses["dynamic/image"].detach()) > 0
    assert abs(output.losses["lm"].item() - case["scalars"]["loss_lm"]) > 1e-3


def test_a_loss_of_embeddings_runs_the_same_seams_or_says_no(host: Any) -> None:
    inputs = batch_of(["one"])
    given = {"inputs_embeds": inputs.inputs_embeds, "attention_mask": inputs.attention_mask, "labels": inputs.labels}
    for segments in (None, inputs.segments):
        with pytest.raises(FlagError, match="it was not told that a loss is wanted"):
            host(**given, segments=segments)
    assert torch.isfinite(host(**given, segments=host.extensions.on_inputs(host, inputs).segments).loss)


def test_a_pass_that_fails_half_way_leaves_nothing_behind(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next inference drops tokens as if there had been no pass with a loss."""
    host.eval()
    inputs = replace(batch_of(["one"]), labels=None)
    prompt = {"inputs_embeds": inputs.inputs_embeds, "attention_mask": inputs.attention_mask}
    with torch.no_grad():
        expected = host(**prompt, segments=host.extensions.on_inputs(host, inputs).segments).logits
    assert expected.shape[1] < inputs.inputs_embeds.shape[1]

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(host.get_decoder().layers[-1], "forward", fail)
        with pytest.raises(RuntimeError, match="half way"):
            run(host, batch_of(["one"]))
    with torch.no_grad():
        found = host(**prompt, segments=host.extensions.on_inputs(host, inputs).segments).logits
    assert torch.equal(found, expected)


def test_share_of_kept_tokens_and_temperature_are_metrics(host: Any) -> None:
    host.extensions.metrics(host)
    recorded = run(host, batch_of(list(SAMPLES)))
    values = host.extensions.metrics(host)
    assert values["dynamic/tau"] == 0.7
    for name, decision in recorded.decisions.items():
        kept = decision.kept[decision.judged].detach().mean()
        assert values[f"dynamic/kept_{name}"] == pytest.approx(float(kept), abs=1e-6)
    assert host.extensions.metrics(host) == {"dynamic/tau": 0.7}
    host.eval()
    run(host, batch_of(["one"]))
    assert host.extensions.metrics(host) == {"dynamic/tau": 0.7}, "evaluation does not count"
