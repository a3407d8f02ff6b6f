"""Packed rows: loss and gradients are those of a row for each sample, and no sample sees another."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collator import DataCollatorForSupervisedDataset
from llava.errors import FlagError
from llava.model.builder import load_pretrained_model
from llava.model.language_model import packed_attention
from llava.model.language_model.backbones import backbone_class, load_config
from llava.model.language_model.packed_attention import NAME, packed_kernel, use_packed_attention
from llava.model.loss import LossReduction
from tests.golden import golden_dir
from tests.model import backbones

LENGTHS = (40, 23, 7, 12)
LIMIT = 64
CLOSE = {"rtol": 1e-4, "atol": 2e-6}  # measured below: loss 2.4e-7, gradients 1.5e-6 at magnitudes up to 5
Batch = dict[str, Any]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    backbones.plain_model(request.param).save_pretrained(folder)
    loaded = backbone_class(folder).from_pretrained(folder, config=load_config(folder)).train()
    loaded.config.tokenizer_model_max_length = LIMIT
    return loaded


def text_items(changed: int | None = None) -> list[dict[str, Tensor]]:
    """Samples of text; all tokens of `changed` are others."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(3, 890, (length,), generator=generator) + int(number == changed)
        labels = ids.masked_fill(torch.arange(length) < 3, IGNORE_INDEX)
        found.append({"input_ids": ids, "labels": labels})
    return found


def batch_of(model: Any, items: list[dict[str, Any]], packing: bool) -> Batch:
    tokenizer: Any = SimpleNamespace(model_max_length=LIMIT, pad_token_id=0)
    return DataCollatorForSupervisedDataset(tokenizer, model.splice_planner(packing))(items)


def results(model: Any, batch: Batch, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch, **options).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach()} | gradients


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model", backbones.MODELS, indirect=True)
def test_equal_to_a_row_each(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    apart, packed = (batch_of(model, text_items(), packing) for packing in (False, True))
    assert (apart["plan"].input_ids.shape, packed["plan"].input_ids.shape) == ((4, 40), (2, 42))
    check_equal(results(model, packed, skip_logits=True), results(model, apart, skip_logits=True))


@pytest.mark.parametrize("items", [None, 41])
@pytest.mark.parametrize("reduction", list(LossReduction))
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_every_reduction_is_that_of_a_row_each(model: Any, reduction: LossReduction, items: int | None) -> None:
    model.loss_reduction = reduction
    divided = items if reduction is LossReduction.TARGET else None
    apart, packed = (batch_of(model, text_items(), packing) for packing in (False, True))
    with torch.no_grad():
        losses = [
            model(**batch, num_items_in_batch=divided, skip_logits=skip).loss
            for batch in (apart, packed)
            for skip in (True, False)
        ]
    model.loss_reduction = LossReduction.TARGET
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(4), rtol=1e-6, atol=1e-6)


def by_sample(model: Any, items: list[dict[str, Any]]) -> list[Tensor]:
    """The logits (n, V) of each sample of a packed batch."""
    batch = batch_of(model, items, packing=True)
    assert len(batch["plan"].input_ids) < len(items)
    with torch.no_grad():
        logits = model(**batch).logits
    return [logits[batch["plan"].packed.samples == number] for number in range(len(items))]


@pytest.mark.parametrize("changed", [1, 2])  # 1, 2 and 3 share a row
@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2, window", "qwen3"], indirect=True)
def test_no_sample_sees_another(model: Any, changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; with a mask that is causal alone, the negative control, they do."""
    model.set_attn_implementation("sdpa")
    before, after = by_sample(model, text_items()), by_sample(model, text_items(changed))
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert same == [number != changed for number in range(len(LENGTHS))]
    expected = model(**batch_of(model, text_items(), packing=False)).logits
    for found, wanted, length in zip(before, expected, LENGTHS, strict=True):
        torch.testing.assert_close(found, wanted[:length], rtol=1e-4, atol=1e-4)
    make = packed_attention._block_mask
    monkeypatch.setattr(
        packed_attention, "_block_mask", lambda config, kind, samples, *form: make(config, kind, samples * 0, *form)
    )
    before, after = by_sample(model, text_items()), by_sample(model, text_items(changed))
    assert sum(torch.equal(one, other) for one, other in zip(before, after, strict=True)) < len(LENGTHS) - 1


# Images


@pytest.fixture(scope="module")
def llava() -> Any:
    loaded = load_pretrained_model(str(golden_dir("llava") / "tiny-llava-v1.5"), device="cpu")[1]
    loaded.config.tokenizer_model_max_length = LIMIT
    return loaded.requires_grad_(True).train()


def image_items(tiles: bool) -> list[dict[str, Any]]:
    """Samples with one image, none (with its dummy), two, and a long text that is cut; of other sizes with tiles."""
    generator = torch.Generator().manual_seed(5)
    image, found = IMAGE_TOKEN_INDEX, []
    rows = [[1, 5, image, 8, 6, 4], [1, 9, 2, 4], [1, image, 3, image, 6, 2, 8], [*range(2, 50), image, *range(2, 30)]]
    for number, ids in enumerate(rows):
        tokens = torch.tensor(ids)
        labels = torch.where((tokens > 0) & (tokens % 2 == 0), tokens, IGNORE_INDEX)
        count = max(1, ids.count(image))
        pixels: Any = torch.randn(count, 3, 28, 28, generator=generator)
        item: dict[str, Any] = {"input_ids": tokens, "labels": labels, "image": pixels}
        if tiles:
            item["image"] = [torch.randn(1 + number, 3, 28, 28, generator=generator) for _ in range(count)]
            item["image_sizes"] = [(28, 28)] * count
        found.append(item)
    return found


@pytest.mark.parametrize("tiles", [False, True], ids=["images", "tiles"])
def test_images_are_those_of_their_sample(llava: Any, tiles: bool) -> None:
    apart, packed = (batch_of(llava, image_items(tiles), packing) for packing in (False, True))
    assert packed["plan"].input_ids.numel() < apart["plan"].input_ids.numel()
    check_equal(results(llava, packed, skip_logits=True), results(llava, apart, skip_logits=True))


def test_noise_is_that_of_a_row_each(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled by the text of each sample; with draws that are all alike the losses are equal."""
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, low, high: x.fill_(high))
    monkeypatch.setattr(llava, "noise_alpha", 5.0)
    apart, packed = (batch_of(llava, image_items(False), packing) for packing in (False, True))
    check_equal(results(llava, packed), results(llava, apart))


# The kernels for bounds, which need a GPU


def test_where_the_kernel_runs() -> None:
    config: Any = SimpleNamespace(head_dim=128)
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert packed_kernel(config, cuda, half) is packed_attention.torch_kernel
    assert packed_kernel(config, cuda, torch.float32) is None
    assert packed_kernel(config, torch.device("cpu"), half) is None
    assert packed_kernel(SimpleNamespace(head_dim=20), cuda, half) is None
    assert packed_kernel(SimpleNamespace(head_dim=128, attention_dropout=0.1), cuda, half) is None


def by_loops(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: int) -> Tensor:
    """What a kernel for bounds computes, sequence by sequence: the last `window + 1` keys of each query, -1 for all."""
    found = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert end - start <= longest
        own = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        keys, values = (x.repeat_interleave(len(own[0]) // len(x), dim=0) for x in own[1:])
        places = torch.arange(end - start)
        distance = places[:, None] - places[None, :]
        hidden = (distance < 0) | ((distance > window) if window >= 0 else False)
        scores = (own[0] @ keys.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        found.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2, window", "qwen3"], indirect=True)
def test_bounds_say_what_the_mask_says(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of the kernel, with a slow one in its place: heads, scale, window, padding at the end of rows."""
    model.set_attn_implementation("sdpa")
    use_packed_attention(model)
    assert model.config._attn_implementation == NAME
    apart, packed = (batch_of(model, text_items(), packing) for packing in (False, True))
    assert (packed["plan"].padding, packed["plan"].packed.longest) == ("right", 40)
    expected = results(model, apart, skip_logits=True)
    monkeypatch.setattr(packed_attention, "packed_kernel", lambda *args: by_loops)
    monkeypatch.setattr(packed_attention, "_block_mask", None)
    check_equal(results(model, packed, skip_logits=True), expected)


@pytest.mark.parametrize("model", ["mistral"], indirect=True)
def test_flash_attn_of_transformers_gets_the_bounds(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code, with a slow function in place of the package's; nothing else of the package may be called."""

    def settings(**given: Any) -> dict[str, Any]:
        return {name: given[name] for name in ("max_seqlen_q", "softmax_scale", "sliding_window", "is_causal")}

    def varlen(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **given: Any) -> Tensor:
        assert cu_seqlens_q is cu_seqlens_k
        assert given["is_causal"]
        return by_loops(
            q, k, v, cu_seqlens_q, given["max_seqlen_q"], given["softmax_scale"], given["sliding_window"] - 1
        )

    # transformers 5.24 has a second function for settings, of paged attention.
    paged = "process_paged_kwargs_fn" in inspect.getsource(flash._flash_attention_forward)
    functions = (None, varlen, None, None, None), (settings, None) if paged else settings
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **kwargs: functions)
    model.set_attn_implementation("sdpa")
    apart, packed = (batch_of(model, text_items(), packing) for packing in (False, True))
    expected = results(model, apart, skip_logits=True)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    check_equal(results(model, packed, skip_logits=True), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("heads", [4, 2])
def test_the_kernel_on_a_gpu(heads: int, window: int) -> None:
    """Output and gradients in bfloat16 against loops in float32."""
    generator = torch.Generator().manual_seed(3)
    bounds = torch.tensor([0, 40, 42, 65, 72, 84], dtype=torch.int32)
    q, k, v = (torch.randn(84, count, 64, generator=generator) for count in (4, heads, heads))
    found, expected = [], []
    for values, device, kernel in ((found, "cuda", packed_attention.torch_kernel), (expected, "cpu", by_loops)):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        leaves = [x.bfloat16().to(device, dtype).requires_grad_() for x in (q, k, v)]
        output = kernel(*leaves, bounds.to(device), 40, 0.125, window)
        output.float().square().sum().backward()
        values += [output.detach(), *(leaf.grad for leaf in leaves)]
    for one, other in zip(found, expected, strict=True):
        assert (one.float().cpu() - other).norm() / other.norm() < 0.01


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_an_attention_that_takes_neither_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(FlagError, match=r"the attention 'flex_attention' does not keep the samples of a row apart"):
        model(**batch_of(model, text_items(), packing=True))
