"""`vision_decision` "topk": an exact number of image tokens, its gradient, and what it can learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamic.config import SparseConfig, kept_count
from dynamic.extension import DynamicExtension
from dynamic.layer import gumbel_keep, gumbel_noise, gumbel_top_keep, hard_keep, top_keep_mask
from dynamic.original import CONFIG_KEY
from llava.convert.original import export_original
from llava.errors import FlagError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import save_checkpoint
from llava.train.arguments import parse_args
from llava.train.train_sparse import DEFAULTS
from tests.dynamic.golden_model import arch, golden_model
from tests.dynamic.test_checkpoints import TOKENIZER, load, write_original
from tests.dynamic.test_training import SAMPLES, batch_of, constant_noise, real_logits, run

SPARSE = arch()["sparse_config"] | {"vision_decision": "topk"}
LENGTHS = (16, 9, 1, 0, 5)


def spans(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (R, n, 2), noise (R, n) and valid (R, n)."""
    torch.manual_seed(0)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return 2 * torch.randn(*valid.shape, 2), gumbel_noise(valid.shape), valid


@pytest.fixture(scope="module")
def host(golden_tower: Path) -> Any:
    model, extension = golden_model(golden_tower, SPARSE)
    extension._schedule(model).tau = 0.7
    return model


@pytest.mark.parametrize("tau", [1.0, 0.05])
@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.99, 1.0])
def test_each_image_keeps_exactly_its_share(rate: float, tau: float) -> None:
    logits, noise, valid = spans()
    kept = gumbel_top_keep(logits.requires_grad_(), noise, rate, valid, tau)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert kept.sum(dim=1).tolist() == [kept_count(n, rate) if n else 0 for n in LENGTHS]
    assert not kept[~valid].any()
    drawn = gumbel_keep(logits, torch.stack([noise, noise.flip(0)], dim=-1), tau) * valid
    if rate == 0.2:
        assert drawn.sum(dim=1).tolist() != kept.sum(dim=1).tolist(), "the other rule has no exact number"


@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
def test_the_gradient_is_that_of_a_sigmoid_at_the_threshold(rate: float, tau: float) -> None:
    """Against a loop over the rows that sorts the scores of each alone."""
    logits, noise, valid = spans()
    upstream = torch.randn(valid.shape)
    expected = torch.zeros_like(logits)
    for row, length in enumerate(LENGTHS):
        k = kept_count(length, rate)
        if length in (0, k):
            continue  # nothing to choose from
        score = logits[row, :length, 0] - logits[row, :length, 1] + tau * noise[row, :length]
        best = score.sort(descending=True).values
        soft = 1 / (1 + torch.exp(-(score - (best[k - 1] + best[k]) / 2) / tau))
        slope = upstream[row, :length] * soft * (1 - soft) / tau
        expected[row, :length] = torch.stack([slope, -slope], dim=-1)
    (gumbel_top_keep(logits.requires_grad_(), noise, rate, valid, tau) * upstream).sum().backward()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-6)
    assert bool(expected.any()) == (rate < 1)


def test_without_noise_it_keeps_what_inference_keeps() -> None:
    logits, noise, valid = spans((40, 33, 7))
    for rate in (0.1, 0.5):
        best = top_keep_mask(logits, rate, valid)
        assert torch.equal(gumbel_top_keep(logits, torch.zeros_like(noise), rate, valid, 1.0).bool(), best)
        assert torch.equal(gumbel_top_keep(logits, noise, rate, valid, 1e-4).bool(), best), "the noise falls with tau"
        assert not torch.equal(gumbel_top_keep(logits, noise, rate, valid, 1.0).bool(), best)


def test_a_row_does_not_hang_on_its_neighbors() -> None:
    logits, noise, valid = spans()
    together = gumbel_top_keep(logits, noise, 0.4, valid, 0.5)
    for row, length in enumerate(LENGTHS[:3]):
        cut = (slice(row, row + 1), slice(0, length))
        alone = gumbel_top_keep(logits[cut], noise[cut], 0.4, valid[cut], 0.5)
        assert torch.equal(together[cut], alone)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pass_keeps_exactly_that_many_and_has_no_loss_on_their_share(
    host: Any, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.train()
    constant_noise(monkeypatch)
    names = list(SAMPLES)
    together = run(host, batch_of(names, side))
    assert together.losses.keys() == {"dynamic/output_text", "dynamic/instruct"}
    for row, segment in enumerate(together.inputs.segments):
        for start, end in segment.images:
            assert float(together.policy[row, start:end].detach().sum()) == kept_count(
                end - start, SPARSE["vision_keep_rate"]
            )
        alone = run(host, batch_of([names[row]], side))
        # Measured for the other rule: 1.4e-5 at logits up to 9.
        torch.testing.assert_close(real_logits(together, row), real_logits(alone, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("names", "learns"), [(["one", "two"], True), (["text"], False)])
def test_the_loss_of_the_language_model_reaches_the_predictor(host: Any, names: list[str], learns: bool) -> None:
    """Without an image too it has a gradient, of zeros: other processes wait for it."""
    host.train().zero_grad(set_to_none=True)
    run(host, batch_of(names)).total.backward()
    gradients = [weight.grad for weight in host.get_decoder().image_score_predictor.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients) == learns


def test_evaluation_is_that_of_the_other_rule(host: Any, golden_tower: Path) -> None:
    """Both keep the best without noise; the loss on the share is left out all the same."""
    other, _ = golden_model(golden_tower, arch()["sparse_config"])
    ours, theirs = (run(model.eval(), batch_of(["one", "two"])) for model in (host, other))
    assert torch.equal(ours.output.logits, theirs.output.logits)
    assert theirs.losses.keys() - ours.losses.keys() == {"dynamic/image"}


def test_the_spread_of_the_probabilities_is_logged(host: Any) -> None:
    """Means over the images of two passes, against quantiles of each image alone."""
    host.train()
    host.extensions.metrics(host)
    low: list[float] = []
    high: list[float] = []
    hard: list[bool] = []
    agree: list[bool] = []
    for names in (["one", "two"], ["short", "text"]):
        decision = run(host, batch_of(names)).decisions["image"]
        for logits, length in zip(decision.logits.detach(), decision.table.lengths.tolist(), strict=True):
            mine = logits[None, :length]
            levels = mine.softmax(-1)[0, :, 0].quantile(torch.tensor([0.1, 0.9]))
            low.append(float(levels[0]))
            high.append(float(levels[1]))
            best = top_keep_mask(mine, SPARSE["vision_keep_rate"], torch.ones(1, length, dtype=torch.bool))
            hard += hard_keep(mine)[0].tolist()
            agree += (hard_keep(mine) == best)[0].tolist()
    values = host.extensions.metrics(host)
    expected = {"keep_p10": low, "keep_p90": high, "hard_image": hard, "agree_image": agree}
    for name, found in expected.items():
        assert values[f"dynamic/{name}"] == pytest.approx(sum(found) / len(found), abs=1e-6)
    assert values["dynamic/keep_p10"] < values["dynamic/keep_p90"]
    run(host, batch_of(["text"]))
    assert "dynamic/keep_p10" not in host.extensions.metrics(host), "no image, no number"


def test_it_learns_which_token_counts() -> None:
    """One logit a token, of 16; the target is in a token that the loss alone tells; two are kept."""
    torch.manual_seed(0)
    wanted, valid = 11, torch.ones(8, 16, dtype=torch.bool)
    weight = torch.zeros(16, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for step in range(150):
        logits = torch.stack([weight, torch.zeros(16)], dim=-1).expand(8, 16, 2)
        kept = gumbel_top_keep(logits, gumbel_noise(valid.shape), 2 / 16, valid, 0.1 ** (step / 150))
        assert bool((kept.sum(dim=1) == 2).all())
        values = torch.randn(8, 16)
        loss = ((values * kept).sum(dim=1) - values[:, wanted]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    others = torch.cat([weight[:wanted], weight[wanted + 1 :]]).detach()
    assert float(weight.detach()[wanted]) > float(others.max()) + 1


def test_the_rule_is_in_the_checkpoint_and_not_in_folders_of_the_original(golden_tower: Path, tmp_path: Path) -> None:
    model = load(write_original(tmp_path / "original", golden_tower, vision_decision="topk"))
    model.requires_grad_(True)
    model.get_vision_tower().requires_grad_(False)
    save_checkpoint(model, tmp_path / "ours", load_pretrained_model(str(TOKENIZER), device="cpu")[0])
    again = load(tmp_path / "ours")
    (attached,) = again.extensions
    assert isinstance(attached.extension, DynamicExtension)
    assert attached.config["vision_decision"] == "topk"
    exported = export_original(tmp_path / "ours", tmp_path / "back")
    assert json.loads((exported / "config.json").read_text())[CONFIG_KEY] == arch()["sparse_config"]


def test_the_flag(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text("[]")
    line = ["--output_dir", str(tmp_path / "out"), "--data_path", str(data), "--mm_use_im_patch_token", "False"]
    line += ["--use_cpu", "True", "--report_to", "none"]
    assert parse_args(line, defaults=DEFAULTS).extensions["dynamic"]["vision_decision"] == "gumbel"
    given = parse_args([*line, "--vision_decision", "topk"], defaults=DEFAULTS)
    assert given.extensions["dynamic"]["vision_decision"] == "topk"
    with pytest.raises(FlagError, match="without effect while --dynamic is off"):
        parse_args([*line, "--vision_decision", "topk", "--dynamic", "False"])
    with pytest.raises(ValueError, match="vision_decision is 'best', expected 'gumbel' or 'topk'"):
        SparseConfig(vision_decision="best")
