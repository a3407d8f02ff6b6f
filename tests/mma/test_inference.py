"""Routing at inference: the same with and without cache, in batches, with beams, and never stale."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import save_checkpoint
from llava.model.language_model.backbones import backbone_class, load_config
from llava.runtime.cache_name import cache_of
from mma.config import MmaConfig
from mma.extension import MmaExtension
from mma.model import EMBEDDING, adapters
from tests.llava.model.test_generation import prompts
from tests.mma.adapted_models import BASE, BLOCK, CLOSE, adapted_llava, attach_adapters
from tests.model import backbones

pytestmark = pytest.mark.versions

LIMITS = {torch.bfloat16: 0.05, torch.float16: 0.0125}
"""Relative distance of logits from fp32; measured: 0.046 and 0.0063."""


@pytest.fixture(scope="module")
def model() -> Any:
    return adapted_llava()


def scores(model: Any, ids: Tensor, images: Tensor, new: int = 5, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits (B, new, V) and tokens (B, new) of greedy generation."""
    fixed = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    out = model.generate(
        ids, images=images.to(model.dtype), output_logits=True, return_dict_in_generate=True, **fixed, **options
    )
    return torch.stack(out.logits, dim=1).float(), out.sequences


def logits_of(model: Any) -> Tensor:
    """Logits (positions, V) of the mixed batch, row after row without padding."""
    batch = prompts()
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "images": batch.images.to(model.dtype)}
    with torch.no_grad():
        valid = model.build_inputs(**inputs, padding_side="left").attention_mask
        return model(**inputs).logits[valid]


def table_of(model: Any) -> Tensor:
    """The kept weights of a model."""
    (extension,) = (item.extension for item in model.extensions if isinstance(item.extension, MmaExtension))
    return extension._tables[model][0].weights


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(model: Any, side: str) -> None:
    """An image, two of them and none: rows of both modalities, padded."""
    batch = prompts(side)
    logits, tokens = scores(model, batch.ids, batch.images, attention_mask=batch.mask)
    for number, (row, images) in enumerate(zip(batch.rows, batch.images_of_rows, strict=True)):
        alone, own = scores(model, row[None], images)
        torch.testing.assert_close(logits[number], alone[0], **CLOSE)
        assert torch.equal(tokens[number], own[0])


def test_without_cache_it_is_the_same(model: Any) -> None:
    batch = prompts()
    cached = scores(model, batch.ids, batch.images, attention_mask=batch.mask)
    whole = scores(model, batch.ids, batch.images, attention_mask=batch.mask, use_cache=False)
    torch.testing.assert_close(cached[0], whole[0], **CLOSE)
    assert torch.equal(cached[1], whole[1])


def test_beams_and_several_answers(model: Any) -> None:
    """Beams are reordered in the cache; each keeps the modality of its prompt."""
    batch = prompts()
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    together = model.generate(batch.ids, images=batch.images, attention_mask=batch.mask, **options)
    uncached = model.generate(batch.ids, images=batch.images, attention_mask=batch.mask, use_cache=False, **options)
    assert torch.equal(together, uncached)
    for number, (row, images) in enumerate(zip(batch.rows, batch.images_of_rows, strict=True)):
        assert torch.equal(model.generate(row[None], images=images, **options), together[2 * number : 2 * number + 2])


def test_the_modality_decides(model: Any) -> None:
    """Swapping the rows of the embedding changes text and images alike, and swapping back restores them."""
    before = logits_of(model)
    table = table_of(model)
    assert (table[:, 0] - table[:, 1]).abs().max() > 0.1
    weight = getattr(model.get_decoder(), EMBEDDING).weight
    with torch.no_grad():
        weight.copy_(weight.flip(0).clone())
    assert bool(((logits_of(model) - before).abs().amax(dim=1) > 1e-3).all()), "every position of both modalities"
    torch.testing.assert_close(table_of(model), table.flip(1))
    with torch.no_grad():
        weight.copy_(weight.flip(0).clone())
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-6)


def test_the_table_is_what_training_computes(model: Any) -> None:
    """With gradients the modality goes through layer by layer; without, it comes from the table."""
    batch = prompts()
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "images": batch.images}
    expected = logits_of(model)
    with torch.enable_grad():
        valid = model.build_inputs(**inputs, padding_side="left").attention_mask
        logits = model(**inputs).logits[valid]
    torch.testing.assert_close(logits, expected, **CLOSE)
    plain = load_pretrained_model(str(BASE), device="cpu")[1]
    assert (logits_of(plain) - expected).abs().max() > 0.1


def test_the_table_is_computed_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_of(model)
    kept = table_of(model)
    batch = prompts()
    scores(model, batch.ids, batch.images, attention_mask=batch.mask)
    logits_of(model)
    assert table_of(model) is kept


def replace_linear(model: Any) -> None:
    projection = model.get_decoder().layers[0].self_attn.v_proj
    new = nn.Linear(projection.in_features, projection.out_features, bias=False).eval()
    model.get_decoder().layers[0].self_attn.v_proj = new


def load_state(model: Any) -> None:
    model.load_state_dict({name: tensor + 0.05 for name, tensor in model.state_dict().items()})


def write_in_place(model: Any) -> None:
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.down_proj.weight.mul_(-1)


def point_elsewhere(model: Any) -> None:
    weight = model.get_decoder().layers[0].self_attn.o_proj.weight
    weight.data = -weight.data


def other_temperature(model: Any) -> None:
    adapters(model.get_decoder().layers[1])[0].temperature = 0.1


def train_a_step(model: Any) -> None:
    """An update that goes by versions: written through `.data`, as DeepSpeed does."""
    model.train()
    weight = model.get_decoder().layers[0].self_attn.v_proj.weight.requires_grad_()
    batch = prompts()
    ids = batch.rows[2][None]
    model(input_ids=ids, images=batch.images_of_rows[2], labels=ids).loss.backward()
    weight.data.add_(0.3 * torch.ones_like(weight))
    weight.requires_grad_(False)
    weight.grad = None
    model.eval()


CHANGES = [replace_linear, load_state, write_in_place, point_elsewhere, other_temperature, train_a_step]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_goes_unnoticed(change: Any) -> None:
    """After any of these the model routes as a fresh one with the same weights does."""
    model = adapted_llava()
    before = logits_of(model)
    first = table_of(model).clone()
    change(model)
    after = logits_of(model)
    assert (table_of(model) - first).abs().max() > 1e-4, "the change matters to the routing"
    assert not torch.equal(after, before)
    fresh = copy.deepcopy(model)
    for item in fresh.extensions:
        item.extension._tables.clear()
    assert torch.equal(logits_of(fresh), after)


def test_switching_lora_is_noticed() -> None:
    model = adapted_llava()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = [f"model.layers.{index}.self_attn.v_proj" for index in range(3)]
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()
    on = logits_of(model)
    on_table = table_of(model)
    with wrapped.disable_adapter():
        off, off_table = logits_of(model), table_of(model)
    assert (on_table - off_table).abs().max() > 1e-4
    assert (on - off).abs().max() > 1e-3
    torch.testing.assert_close(off, logits_of(adapted_llava()), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits_of(model), on, rtol=0, atol=0)


def test_threads_do_not_meet(model: Any) -> None:
    """Two threads in the same layers at once, one with an image and one without, as a server may have them."""
    batch = prompts()

    def answer(number: int) -> Tensor:
        with torch.no_grad():
            return model(input_ids=batch.rows[number][None], images=batch.images_of_rows[number]).logits

    numbers = (0, 2)
    expected = [answer(number) for number in numbers]
    with ThreadPoolExecutor(2) as pool:
        for number, logits in zip(numbers * 20, pool.map(answer, numbers * 20), strict=True):
            torch.testing.assert_close(logits, expected[numbers.index(number)], **CLOSE)


def test_a_cache_without_prompt_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="the modality of these tokens is unknown"):
        model(inputs_embeds=torch.randn(1, 3, 40))
    batch = prompts()
    with torch.no_grad():
        out = model(input_ids=batch.ids, attention_mask=batch.mask, images=batch.images, use_cache=True)
        cache = cache_of(out)
        with pytest.raises(ValueError, match="holds 3 rows whose modality is known, but the batch has 1"):
            model(input_ids=torch.tensor([[5]]), cache=cache)


def reorder(cache: Any) -> list[int]:
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    return [2, 0, 1]


def select(cache: Any) -> list[int]:
    cache.batch_select_indices(torch.tensor([2, 0]))
    return [2, 0]


def repeat(cache: Any) -> list[int]:
    cache.batch_repeat_interleave(2)
    return [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("change", [reorder, select, repeat], ids=lambda change: change.__name__)
def test_rows_of_a_cache_keep_their_modality(model: Any, change: Any) -> None:
    """Rows of both modalities change places in the cache of a caller; each goes on as it would have in its place."""
    batch = prompts()
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "images": batch.images}

    def go_on(cache: Any, rows: list[int]) -> Tensor:
        seen = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.bool)], dim=1)[rows]
        positions = (seen.cumsum(1) - 1)[:, -1:]
        token = torch.tensor([[350], [400], [500]])[rows]
        return model(input_ids=token, attention_mask=seen, position_ids=positions, cache=cache).logits

    with torch.no_grad():
        mask = model.build_inputs(**inputs, padding_side="left").attention_mask
        cache = cache_of(model(**inputs, use_cache=True))
        assert isinstance(cache, DynamicCache)
        expected = go_on(copy.deepcopy(cache), [0, 1, 2])
        rows = change(cache)
        torch.testing.assert_close(go_on(cache, rows), expected[rows], rtol=1e-4, atol=1e-5)


def test_a_layer_cannot_be_called_past_the_seam(model: Any) -> None:
    layer = model.get_decoder().layers[0]
    hidden = torch.randn(1, 3, 40)
    positions = model.get_decoder().rotary_emb(hidden, position_ids=torch.arange(3)[None])
    with pytest.raises(RuntimeError, match="was called without 'modality_routing'"):
        layer(hidden, position_embeddings=positions)


@pytest.mark.parametrize("kind", ["mistral", "qwen2, window", "qwen2, tied", "qwen3"])
def test_backbones(kind: str, tmp_path: Path) -> None:
    """Text alone: logits with the table equal those layer by layer, and the cache continues them."""
    folder = backbones.save_base(kind, tmp_path)
    ours = backbone_class(folder).from_pretrained(folder, config=load_config(folder))
    plain = copy.deepcopy(ours).eval()
    attach_adapters(ours, MmaConfig(adapter_type="block", visual_adapter_type="none"))
    ids = torch.randint(3, 890, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        assert (plain(input_ids=ids).logits - expected).abs().max() > 0.05
        out = ours(input_ids=ids[:, :7], use_cache=True)
        for index in range(7, 12):
            out = ours(input_ids=ids[:, index : index + 1], cache=cache_of(out))
            torch.testing.assert_close(out.logits[:, -1], expected[:, index], **CLOSE)
    with torch.enable_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """A checkpoint on a base in half precision: adapters as they were saved in fp32, and logits close to fp32."""
    saved = adapted_llava()
    save_checkpoint(saved, tmp_path / "adapters", load_pretrained_model(str(BASE), device="cpu")[0])
    half = load_pretrained_model(str(tmp_path / "adapters"), str(BASE), device="cpu", torch_dtype=dtype)[1]
    added = half.extensions.named_parameters(half)
    for name, weight in saved.extensions.named_parameters(saved).items():
        assert torch.equal(added[name], weight), "neither rounded nor left as drawn"
    assert {weight.dtype for weight in half.get_decoder().layers[0].self_attn.parameters()} == {dtype}
    exact, ours = logits_of(saved), logits_of(half).float()
    assert 0 < float((ours - exact).norm() / exact.norm()) < LIMITS[dtype]


def test_eager_attention_is_the_same(model: Any) -> None:
    expected = logits_of(model)
    eager = adapted_llava(attn_implementation="eager")
    torch.testing.assert_close(logits_of(eager), expected, **CLOSE)


def test_four_bits() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    model = adapted_llava(BLOCK, load_4bit=True)
    batch = prompts()
    logits, tokens = scores(model, batch.ids, batch.images, attention_mask=batch.mask)
    alone, own = scores(model, batch.rows[0][None], batch.images_of_rows[0])
    assert torch.equal(tokens[0], own[0])
    torch.testing.assert_close(logits[0], alone[0], rtol=1e-3, atol=1e-3)
