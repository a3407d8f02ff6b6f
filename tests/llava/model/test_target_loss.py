"""The loss from the hidden states of trained tokens: equal to that of all logits, which are never made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava.constants import IGNORE_INDEX
from llava.data.targets import BUCKET, bucket, find_targets
from llava.model import head as heads
from llava.model import loss as losses
from llava.model.checkpoint import bare_model
from llava.model.head import LanguageHead, chunk_rows, liger_loss, selected_cross_entropy
from llava.model.loss import LossReduction, language_model_loss, row_totals, target_loss
from llava.runtime.monitoring.losses import row_losses
from llava.train.train import build_run, parse_args
from tests.llava.train.test_training import HYDRA, command_line

B, L, D, V = 3, 90, 24, 700
EQUAL = {"rtol": 1e-5, "atol": 1e-6}

DYNAMIC = {"dynamic": True, "sparse_layer": 1}
MMA = {"mma": True, "adapter_type": "block", "visual_adapter_type": "router_block", "visual_input": "llava"}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"label_smoothing_factor": 0.1},
    "hydralora": HYDRA | {"moe_balance_w": 0.05},
    "dynamic": DYNAMIC,
    "mma": MMA,
}


class Sizes(TorchDispatchMode):
    """The number of entries of the largest tensor with the vocabulary as its last axis."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.largest = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            # Views of the weight have the vocabulary there as well, and the width in front.
            if isinstance(made, Tensor) and made.ndim and made.shape[-1] == self.vocabulary:
                self.largest = max(self.largest, made.numel() // self.vocabulary)
        return result


def batch(targets: float = 0.3) -> tuple[Tensor, Tensor]:
    """Hidden states with gradients, and labels of which a share is trained on."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(B, L, D, generator=generator, requires_grad=True)
    labels = torch.randint(0, V, (B, L), generator=generator)
    return hidden, labels.masked_fill(torch.rand(B, L, generator=generator) >= targets, IGNORE_INDEX)


@pytest.fixture
def head() -> LanguageHead:
    torch.manual_seed(5)
    return LanguageHead(D, V, bias=False)


def results(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_targets_are_the_positions_in_front_of_labels() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, 9, -100, -100]])
    found = find_targets(labels)
    assert found.positions[:3].tolist() == [1, 2, 4]  # nothing predicts the first token of a row
    assert found.labels[:3].tolist() == [7, 8, 9]
    assert found.positions.shape == found.labels.shape == (BUCKET,)
    assert (found.positions[3:] == 0).all()
    assert (found.labels[3:] == IGNORE_INDEX).all()


def test_few_lengths_occur_and_little_is_added() -> None:
    lengths = {bucket(count) for count in range(0, 5000)}
    assert len(lengths) < 45
    assert bucket(0) == bucket(1) == BUCKET
    for count in range(1, 5000, 7):
        assert count <= bucket(count) <= max(BUCKET, count + max(BUCKET, count // 8))


@pytest.mark.parametrize("items", [None, 41])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", list(LossReduction))
def test_equal_to_the_loss_of_all_logits(
    reduction: LossReduction, smoothing: float, items: int | None, head: LanguageHead
) -> None:
    hidden, labels = batch()
    expected = results(language_model_loss(head(hidden), labels, reduction, items, smoothing), hidden, head.weight)
    for targets in (None, find_targets(labels)):
        loss = target_loss(head, hidden, labels, targets, reduction, items, smoothing)
        for found, wanted in zip(results(loss, hidden, head.weight), expected, strict=True):
            torch.testing.assert_close(found, wanted, **EQUAL)
    assert expected[0] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype, head: LanguageHead) -> None:
    hidden, labels = batch()
    head.to(dtype)
    loss = target_loss(head, hidden.to(dtype), labels, None, LossReduction.TARGET)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(
        loss, language_model_loss(head(hidden.to(dtype)), labels, LossReduction.TARGET), rtol=1e-4, atol=0
    )


def test_a_batch_without_targets_runs_the_head_with_no_weight(head: LanguageHead) -> None:
    hidden, labels = batch(targets=0)
    rows: list[int] = []
    head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    loss = target_loss(head, hidden, labels, None, LossReduction.TARGET)
    found = results(loss, hidden, head.weight)
    assert rows == [BUCKET]
    assert all((value == 0).all() for value in found)


def test_lost_positions_are_noticed(head: LanguageHead) -> None:
    hidden, labels = batch()
    with pytest.raises(ValueError, match=rf"\({B}, {L - 1}\) positions and labels of \({B}, {L}\)"):
        target_loss(head, hidden[:, 1:], labels, None, LossReduction.TARGET)


def adapted(head: LanguageHead) -> nn.Module:
    """The head with LoRA of PEFT around it."""
    model = nn.Module()
    model.lm_head = head
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"], r=4), model)
    nn.init.normal_(wrapped.lm_head.lora_B["default"].weight)
    return wrapped.lm_head


@pytest.mark.parametrize("wrap", [lambda head: head, adapted], ids=["head", "lora"])
def test_many_targets_are_computed_in_chunks(
    wrap: Callable[[LanguageHead], nn.Module], head: LanguageHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, labels = batch(targets=0.9)
    module, leaves = wrap(head), [weight for weight in head.parameters() if weight.requires_grad]
    leaves = [weight for weight in module.parameters() if weight.requires_grad]
    expected = results(target_loss(module, hidden, labels, None, LossReduction.ALL, None, 0.1), hidden, *leaves)
    monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * V * 70)  # a chunk has 64 rows then
    assert chunk_rows(V) == 64
    with Sizes(V) as sizes:
        loss = target_loss(module, hidden, labels, None, LossReduction.ALL, None, 0.1)
        found = results(loss, hidden, *leaves)
    assert sizes.largest == 64 < int((labels != IGNORE_INDEX).sum())
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, **EQUAL)


@pytest.mark.parametrize("chunk", [heads.CHUNK_BYTES, 0], ids=["whole", "chunks"])
@pytest.mark.parametrize("wrap", [lambda head: head, adapted], ids=["head", "lora"])
def test_the_losses_of_rows_are_those_of_all_logits(
    wrap: Callable[[LanguageHead], nn.Module], chunk: int, head: LanguageHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a row without targets; and what is wrong with one row is in its own loss alone."""
    monkeypatch.setattr(heads, "CHUNK_BYTES", chunk)
    hidden, labels = batch(targets=0.7)
    labels[1] = IGNORE_INDEX
    module = wrap(head)
    with torch.no_grad():
        expected = row_losses(module(hidden), labels).totals
        for targets in (None, find_targets(labels)):
            torch.testing.assert_close(row_totals(module, hidden, labels, targets), expected, **EQUAL)
        hidden[2] = torch.nan
        broken = row_totals(module, hidden, labels, None)
    assert expected[0] > 0 == expected[1]
    torch.testing.assert_close(broken[:2], expected[:2], **EQUAL)
    assert broken[2].isnan()


def test_the_head_is_called_once_however_many_chunks(head: LanguageHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 and FSDP gather a weight for each call of its module, and all processes must call equally often."""
    monkeypatch.setattr(heads, "CHUNK_BYTES", 0)
    hidden, labels = batch(targets=0.9)
    calls: list[nn.Module] = []
    wrapped = adapted(head)
    monkeypatch.setattr(heads, "is_split", lambda weight: True)
    for module in (LanguageHead(D, V, bias=False), wrapped):
        calls.clear()
        module.register_forward_hook(lambda module, args, output: calls.append(module))
        target_loss(module, hidden, labels, None, LossReduction.TARGET).backward()
        assert calls == [module]


@pytest.fixture
def liger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A stand-in for liger-kernel with its signature; notes what it is made with and called on."""
    noted: list[Any] = []

    class Fused:
        def __init__(self, *, ignore_index: int, label_smoothing: float, reduction: str, accum_dtype: Any) -> None:
            noted.append((ignore_index, label_smoothing, reduction, accum_dtype))
            self.smoothing = label_smoothing

        def __call__(self, weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
            noted.append((weight.dtype, tuple(hidden.shape), hidden.dtype))
            return selected_cross_entropy(hidden @ weight.T, targets, self.smoothing)

    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    package.__spec__ = SimpleNamespace(name="liger_kernel")  # type: ignore[assignment]
    inner.LigerFusedLinearCrossEntropyLoss = Fused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    liger_loss.cache_clear()
    yield noted
    liger_loss.cache_clear()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_fused_loss_takes_the_same_seam(autocast: bool, head: LanguageHead, liger: list[Any]) -> None:
    hidden, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = results(target_loss(head, hidden, labels, None, LossReduction.TARGET, None, 0.2), hidden)
        head.fused = liger_loss()
        found = results(target_loss(head, hidden, labels, None, LossReduction.TARGET, None, 0.2), hidden)
    dtype = torch.bfloat16 if autocast else torch.float32
    size = len(find_targets(labels).positions)
    assert liger == [(IGNORE_INDEX, 0.2, "sum", torch.float32), (dtype, (size, D), dtype)]
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-2 if autocast else 1e-5, atol=1e-4)
    with torch.no_grad():
        target_loss(head, hidden, labels, None, LossReduction.TARGET)
    assert len(liger) == 2, "it computes gradients, so an evaluation does without"


def test_without_the_package_there_is_no_fused_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads.importlib.util, "find_spec", lambda name: None)
    liger_loss.cache_clear()
    assert liger_loss() is None
    liger_loss.cache_clear()


def test_a_head_of_another_size_is_still_one(tmp_path: Path) -> None:
    run = build_run(parse_args(command_line(tmp_path / "out", mm_use_im_start_end=True)))
    assert isinstance(run.model.lm_head, LanguageHead)
    assert run.model.lm_head.out_features == run.model.config.vocab_size == len(run.model.lm_head.weight)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_makes_no_logits_of_all_positions(method: str, tmp_path: Path) -> None:
    """Of every method: losses and gradients are those of a pass with logits, which the run itself does without."""
    run = build_run(parse_args(command_line(tmp_path / "out", **METHODS[method])))
    model, llava = run.model.train(), bare_model(run.model)
    rows = run.trainer.data_collator([run.dataset[index] for index in range(4)])
    found: list[dict[str, Tensor]] = []
    for logits in (True, False):
        model.zero_grad()
        torch.manual_seed(6)  # of dropout and of Gumbel noise
        with Sizes(llava.config.vocab_size) as sizes:
            loss = run.trainer.compute_loss(model, dict(rows), return_outputs=logits)
            if logits:
                loss, outputs = loss
                positions = outputs.logits.shape[:2].numel()
            loss.backward()
        assert (sizes.largest >= positions) == logits
        gradients = {n: weight.grad for n, weight in model.named_parameters() if weight.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
    assert len(found[0]) > 3
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert positions > sizes.largest > 0


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_makes_no_logits_of_all_positions(method: str, tmp_path: Path) -> None:
    """Of every method: the losses of rows are those of a pass with logits."""
    run = build_run(parse_args(command_line(tmp_path / "out", **METHODS[method])))
    model = run.model.eval()
    rows = run.trainer.data_collator([run.dataset[index] for index in range(4)])
    with torch.no_grad():
        torch.manual_seed(6)
        outputs = model(**rows)
        expected = row_losses(outputs.logits, outputs.labels)
        torch.manual_seed(6)
        with Sizes(bare_model(model).config.vocab_size) as sizes:
            found = run.trainer.row_losses(model, dict(rows))
    assert 0 < sizes.largest < outputs.labels.numel()
    torch.testing.assert_close(found.totals, expected.totals, rtol=1e-4, atol=1e-5)
    assert found.targets.tolist() == expected.targets.tolist()
    assert found.positions == expected.positions
    others = {name for name in outputs.losses if name != "lm"}
    assert found.others.keys() == others
    assert all(torch.equal(found.others[name], outputs.losses[name]) for name in others)


def test_whoever_does_not_ask_finds_logits(tmp_path: Path) -> None:
    run = build_run(parse_args(command_line(tmp_path / "out")))
    rows = run.trainer.data_collator([run.dataset[0], run.dataset[1]])
    with torch.no_grad():
        plain, skipped = run.model(**rows), run.model(**rows, skip_logits=True)
        _, outputs = run.trainer.compute_loss(run.model, dict(rows), return_outputs=True)
        inferred = run.model(**{key: value for key, value in rows.items() if key != "labels"}, skip_logits=True)
    assert plain.logits.shape == outputs.logits.shape == inferred.logits.shape
    assert skipped.logits is None
    assert skipped.labels.shape == plain.logits.shape[:2]
    torch.testing.assert_close(skipped.loss, plain.loss, **EQUAL)


class Waits(TorchDispatchMode):
    """Operations that a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_targets_of_the_collator_are_not_waited_for(head: LanguageHead) -> None:
    """Neither eagerly nor by a break of the compiled graph, whether there are chunks or not."""
    hidden, labels = batch()
    targets = find_targets(labels)
    with Waits() as known:
        target_loss(head, hidden, labels, targets, LossReduction.TARGET).backward()
    with Waits() as unknown:
        target_loss(head, hidden, labels, None, LossReduction.TARGET)
    assert not known.found
    assert unknown.found
    compiled = torch.compile(target_loss, backend="eager", fullgraph=True)
    expected = target_loss(head, hidden, labels, targets, LossReduction.TARGET)
    torch.testing.assert_close(compiled(head, hidden, labels, targets, LossReduction.TARGET), expected)


def test_the_model_takes_the_targets_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And looks for them itself where an extension has put other labels in place."""
    run = build_run(parse_args(command_line(tmp_path / "out")))
    rows = run.trainer.data_collator([run.dataset[0], run.dataset[1]])
    searched: list[int] = []
    monkeypatch.setattr(losses, "find_targets", lambda labels: searched.append(1) or find_targets(labels))
    with torch.no_grad():
        planned = run.model(**rows, skip_logits=True).loss
        assert not searched

        def on_inputs(model: nn.Module, inputs: Any) -> Any:
            inputs.labels = inputs.labels.clone()
            return inputs

        monkeypatch.setattr(run.model.extensions, "on_inputs", on_inputs)
        torch.testing.assert_close(run.model(**rows, skip_logits=True).loss, planned)
    assert searched == [1]
