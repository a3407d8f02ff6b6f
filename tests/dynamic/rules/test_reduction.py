"""The common code of all rules: backbones, towers, tiles, cache, positions, handles, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tests.dynamic.rules.example_rules  # noqa: F401  # two more rules
from dynamic.cache import SparseCache
from dynamic.inspection import record_decisions, tokens_by_layer
from dynamic.rules import attach, reduced
from llava.errors import FlagError
from llava.runtime.cache_name import cache_of
from tests.dynamic.rules.reduced_models import PATCHES, SIDE, batch_of, logits_of, long_way, prompts, tiny_llava
from tests.dynamic.sparse_models import sparse_llava

NEAR = {"atol": 2e-5, "rtol": 0}
BOTH = "example-neighbors:0.7+example-last-row:0.3@1,2"


@pytest.mark.parametrize("kind", ["llama", "mistral, no window", "qwen2", "qwen3"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_backbones_and_towers(kind: str, tower: str) -> None:
    model, rows = tiny_llava(kind, tower), list(prompts())
    together = logits_of(batch_of(rows), BOTH, model=model)
    for number, row in enumerate(rows):
        expected = long_way(row, BOTH, model=model)
        torch.testing.assert_close(together[number : number + 1, 0], expected.logits, **NEAR)
        images = len(row.images)
        assert expected.kept == [25 * images, (10 + (36 - 10) // 2) * images, 10 * images]


@pytest.mark.parametrize("merge", ["spatial_unpad", "spatial", "flat"])
def test_tiles(merge: str) -> None:
    """An image in tiles: its lines keep their ends as long as one of their patches is there."""
    model = tiny_llava(merge=merge)
    model.config.image_aspect_ratio, model.config.image_grid_pinpoints = "anyres", [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, 3, SIDE, SIDE, generator=generator), torch.randn(3, 3, SIDE, SIDE, generator=generator)]
    sizes, ids = [(40, 20), (20, 33)], torch.tensor([[5, -200, 7, 8], [9, 4, -200, 6]])

    def run(chosen: list[int]) -> Tensor:
        with record_decisions(model) as log:
            output = model.generate(
                ids[chosen], images=[images[row] for row in chosen], image_sizes=[sizes[row] for row in chosen],
                extensions=reduced(model, "example-neighbors", 20), max_new_tokens=3, min_new_tokens=3, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        for index in range(len(chosen)):
            (kept,) = log.prompts[0].images(index)
            ends = [] if merge != "spatial_unpad" else line_ends(log.prompts[0].segments[index], sizes[chosen[index]])
            assert len(set(kept.tolist()) - set(ends)) == 20
            for start, end in zip([PATCHES, *(each + 1 for each in ends)], ends, strict=False):
                alive = bool(set(range(start, end)) & set(kept.tolist()))
                assert (end in kept.tolist()) == alive
        return torch.stack(output.logits, dim=1)

    together = run([0, 1])
    for row in (0, 1):
        torch.testing.assert_close(together[row : row + 1], run([row]), **NEAR)


def line_ends(segments: Any, size: tuple[int, int]) -> list[int]:
    """Places of the line ends in an image, counted from its first token; `size` in pixels of the whole image."""
    ((start, end),) = segments.images
    columns, rows = (2, 1) if size[0] > size[1] else (1, 2)
    wide, high = columns * SIDE // 4, rows * SIDE // 4
    scale = min(wide / size[0], high / size[1])
    wide = wide - 2 * ((wide - int(size[0] * scale)) // 2) if scale * size[0] < wide else wide
    return list(range(PATCHES + wide, end - start, wide + 1))


def test_the_cache_is_cut_and_positions_go_on() -> None:
    """Each layer stores what is left for it, of each row; the answer continues at the position of the whole prompt."""
    model, rows = tiny_llava(), list(prompts())
    batch = batch_of(rows)
    with record_decisions(model) as log:
        output = model.generate(
            **batch._asdict(), extensions=reduced(model, BOTH), max_new_tokens=4, min_new_tokens=4, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
    cache = cache_of(output)
    assert isinstance(cache, SparseCache)
    report = cache.report()
    for number, row in enumerate(rows):
        images, text = len(row.images), len(row.ids) - len(row.images)
        expected = [25 * images, 23 * images, 10 * images]
        assert tokens_by_layer(log.stages[0], number, 3) == expected
        assert [lengths[number] for lengths in report.lengths] == [text + each + 3 for each in expected]
    longest = max(len(row.ids) + (PATCHES - 1) * len(row.images) for row in rows)
    assert cache.get_seq_length() == longest + 3
    assert report.bytes_of_tokens < report.bytes_held


def test_renumbered_positions_count_what_is_left() -> None:
    row = prompts()[0]
    original = logits_of(batch_of([row]), "example-neighbors", "0.3")
    renumbered = logits_of(batch_of([row]), "example-neighbors", "0.3", positions="renumber")
    assert float((original - renumbered).abs().max()) > 1e-3
    # The same as a prompt of the remaining features alone, without any rule.
    model = tiny_llava()
    extensions = reduced(model, "example-neighbors", 0.3)
    with record_decisions(model) as log:
        model.generate(**batch_of([row])._asdict(), extensions=extensions, max_new_tokens=1, do_sample=False)
    spliced = model.build_inputs(row.ids[None], images=row.images, extensions=extensions)
    short = spliced.inputs_embeds[:, log.prompts[0].keep[0]]
    torch.testing.assert_close(renumbered[:, 0], model(inputs_embeds=short).logits[:, -1], **NEAR)
    batch = batch_of(list(prompts()))
    together = logits_of(batch, BOTH, positions="renumber")
    torch.testing.assert_close(together, logits_of(batch, BOTH, positions="renumber", use_cache=False), **NEAR)


def test_a_handle_is_taken_off_again() -> None:
    model, batch = tiny_llava(), batch_of(list(prompts()))
    plain = model.generate(**batch._asdict(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    once = model.generate(
        **batch._asdict(), max_new_tokens=6, min_new_tokens=6, do_sample=False, extensions=reduced(model, BOTH)
    )
    with attach(model, BOTH):
        assert model.extensions.configs == {}, "no checkpoint knows of it"
        within = model.generate(**batch._asdict(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        with pytest.raises(FlagError, match="in use on this model already"):
            attach(model, BOTH)
        with pytest.raises(FlagError, match="a loss over all positions"):
            model(input_ids=batch.inputs, images=batch.images, labels=batch.inputs)
    after = model.generate(**batch._asdict(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(plain, after)
    assert torch.equal(within, once)
    assert not torch.equal(plain, within)


def test_the_next_turn_continues_with_what_was_chosen() -> None:
    """On the cache of the first turn: equal to explicit masks over both turns, at the positions of the whole."""
    model, row = tiny_llava(), prompts()[0]
    extensions = reduced(model, "example-last-row", 0.3)
    with record_decisions(model) as log, torch.no_grad():
        first = model(input_ids=row.ids[None], images=row.images, extensions=extensions, use_cache=True)
        more = torch.tensor([[11, 12, 13]])
        second = model(input_ids=more, cache=cache_of(first), extensions=extensions).logits
        spliced = model.build_inputs(row.ids[None], images=row.images)
        whole = torch.cat([spliced.inputs_embeds, model.get_input_embeddings()(more)], dim=1)
        length = whole.shape[1]
        left = torch.cat([log.prompts[0].keep[0], torch.ones(3, dtype=torch.bool)])
        decoder, hidden, positions = model.get_decoder(), whole, torch.arange(length)[None]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        for index, layer in enumerate(decoder.layers):
            mask = causal if index == 0 else (causal & left) | torch.eye(length, dtype=torch.bool)
            rotary = decoder.rotary_emb(hidden, position_ids=positions)
            hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary, position_ids=positions)
        expected = model.lm_head(decoder.norm(hidden))[:, -3:]
    torch.testing.assert_close(second, expected, **NEAR)


@pytest.mark.parametrize(
    ("plan", "keep", "said"),
    [
        ("nothing", "0.5", "no rule has this name; known are"),
        ("example-neighbors", None, "has no budget; pass --keep"),
        ("example-neighbors", "1.5", "a share is above 0"),
        ("example-neighbors", "0", "at least 1"),
        ("example-neighbors", "ten", "give a share as 0.25"),
        ("example-neighbors@2", "0.5", "acts at @tower, in front of the decoder, not @2"),
        ("example-last-row@tower", "0.5", "acts before decoder layers"),
        ("example-last-row@3", "0.5", "this decoder has layers 0 to 2"),
        ("example-last-row@0", "0.5", "from layer 1 on"),
        ("example-last-row@2+example-last-row@1", "0.5", "in the order in which they act"),
        ("example-last-row@1+example-neighbors", "0.5", "in the order in which they act"),
        ("example-last-row[x=1]", "0.5", "not an option of 'example-last-row'"),
        ("example-neighbors:avg:9+example-last-row:0.5", None, "the budget of a single rule"),
        ("example-last-row@2", "avg:3", "reaches averages from"),
        ("pool:0.5+visionzip:0.25", None, "a rule at @tower comes before"),
        ("example-neighbors", "9" * 400, "a number of tokens"),
        ("a b", "0.5", "is not of the form"),
        ("learned", "0.5", "has no predictor of image tokens"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(plan: str, keep: str | None, said: str) -> None:
    model, batch = tiny_llava(), batch_of([prompts()[0]])
    with pytest.raises(FlagError, match=said):
        model.generate(**batch._asdict(), extensions=reduced(model, plan, keep), max_new_tokens=1)


def test_other_caches_and_windows_are_refused() -> None:
    model, batch = tiny_llava(), batch_of([prompts()[0]])
    for options in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(FlagError):
            model.generate(**batch._asdict(), extensions=reduced(model, BOTH), max_new_tokens=2, **options)
    with torch.no_grad():
        dense = cache_of(model(input_ids=batch.inputs[:, :3], use_cache=True))
    with pytest.raises(FlagError, match="needs a cache of its own"):
        model(input_ids=batch.inputs[:, :3], cache=dense, extensions=reduced(model, BOTH))
    with pytest.raises(FlagError, match="attend within a window"):
        reduced(tiny_llava("mistral"), BOTH)


def test_learned_predictors_take_another_keep_rate() -> None:
    model = sparse_llava()
    side = model.get_vision_tower().image_size
    ids, image = torch.tensor([[5, -200, 7, 8, 9]]), torch.randn(1, 3, side, side)
    patches = model.get_vision_tower().num_patches
    for keep, count in ((1, 1), ("0.5", patches // 2), (patches - 1, patches - 1)):
        with record_decisions(model) as log:
            model.generate(ids, images=image, extensions=reduced(model, "learned", keep), max_new_tokens=2)
        assert len(log.prompts[0].images(0)[0]) == count
    # Another rule takes the place of the predictors, and they are found again, also for a checkpoint, while it does.
    with attach(model, "example-neighbors", 2):
        assert "dynamic" in model.extensions.configs
        assert any("image_score_predictor" in name for name in model.extensions.named_parameters(model))
        with record_decisions(model) as log:
            model.generate(ids, images=image, extensions=reduced(model, "learned", 1), max_new_tokens=2)
        assert len(log.prompts[0].images(0)[0]) == 1
    output = model.generate(
        ids, images=image, extensions=reduced(model, "example-neighbors", 2), max_new_tokens=3, min_new_tokens=3,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert {lengths[0] for lengths in cache_of(output).report().lengths} == {4 + 2 + 2}
