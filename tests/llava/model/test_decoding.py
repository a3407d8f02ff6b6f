"""Every path of `generate`: the tokens of its own kind with any cache, or a refusal before anything is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

from llava.errors import FlagError
from llava.model import decoding
from llava.model.builder import load_pretrained_model
from llava.model.language_model.backbones import backbone_class, load_config
from llava.runtime.cache_name import cache_of
from tests.dynamic.sparse_models import sparse_llava
from tests.golden import golden_dir
from tests.llava.model.test_generation import Prompts, prompts
from tests.mma.adapted_models import adapted_llava
from tests.model import backbones

pytestmark = pytest.mark.versions

BASE = golden_dir("llava") / "tiny-llava-v1.5"
ROUTED = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"
FIXED = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
HOSTS: dict[str, Callable[[], Any]] = {
    "llava": lambda: load_pretrained_model(str(BASE), device="cpu")[1],
    "hydralora": lambda: load_pretrained_model(str(ROUTED), str(BASE), device="cpu")[1],
    "dynamic": sparse_llava,
    "mma": adapted_llava,
}
each_host = pytest.mark.parametrize("host", HOSTS)
dense_host = pytest.mark.parametrize("host", [host for host in HOSTS if host != "dynamic"])


@functools.cache
def load(host: str) -> Any:
    return HOSTS[host]()


def generate(model: Any, batch: Prompts, **options: Any) -> Any:
    return model.generate(batch.ids, images=batch.images, attention_mask=batch.mask, **{**FIXED, **options})


VALUES: dict[str, list[Any]] = {
    "assistant_model": [torch.nn.Identity()],
    "prompt_lookup_num_tokens": [1, 10],
    "assistant_early_exit": [1],
    "use_mtp": [True],
    "is_assistant": [True],
    "prefill_chunk_size": [1, 512],
    "custom_generate": ["somebody/something", lambda model, **kwargs: None],
    "penalty_alpha": [0.6],
    "dola_layers": ["low", [1]],
    "num_beam_groups": [2],
    "constraints": [[object()]],
    "force_words_ids": [[[5]]],
    "token_healing": [True],
    "guidance_scale": [1.5, 0.5],
    "negative_prompt_ids": [torch.ones(1, 2, dtype=torch.long)],
    "encoder_repetition_penalty": [1.2],
    "encoder_no_repeat_ngram_size": [2],
    "cache_implementation": ["paged"],
}
REFUSED = [(name, value) for name, values in VALUES.items() for value in values]


def test_the_table_has_a_value_for_each_refusal() -> None:
    assert set(VALUES) == {*decoding.REFUSALS, "cache_implementation"}


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda item: str(item)[:20])
def test_refused_before_anything_is_computed(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llava")

    def computed(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the prompt was computed")

    monkeypatch.setattr(type(model), "build_inputs", computed)
    ways: list[dict[str, Any]] = [{name: value}]
    if hasattr(GenerationConfig(), name) and name not in ("constraints", "custom_generate"):
        config = GenerationConfig()
        setattr(config, name, value)
        ways.append({"generation_config": config})
    for options in ways:
        with pytest.raises(FlagError, match=rf"generate\({name}=.*not supported by a LLaVA: .*Leave it out"):
            generate(model, prompts(), **options)
    monkeypatch.setattr(model, "generation_config", GenerationConfig())
    setattr(model.generation_config, name, value)
    with pytest.raises(FlagError, match=name):
        generate(model, prompts())


@pytest.mark.parametrize("options", [{"penalty_alpha": 0}, {"guidance_scale": 1.0}, {"use_mtp": False}], ids=str)
def test_neutral_values_are_not_refused(options: dict[str, Any]) -> None:
    model = load("llava")
    assert torch.equal(generate(model, prompts(), **options), generate(model, prompts()))


@dense_host
def test_a_static_cache_gives_the_same_tokens(host: str) -> None:
    model, batch = load(host), prompts()
    expected = generate(model, batch)
    assert torch.equal(generate(model, batch, cache_implementation="static"), expected)
    room = batch.ids.shape[1] + 60  # the images take more positions than their tokens
    assert torch.equal(generate(model, batch, cache=StaticCache(config=model.config, max_cache_len=room)), expected)
    beams = generate(model, batch, num_beams=3, num_return_sequences=2)
    static = generate(model, batch, num_beams=3, num_return_sequences=2, cache_implementation="static")
    assert torch.equal(static, beams)
    assert not torch.equal(beams[::2], expected), "beams must find something else than greedy search"


@pytest.mark.parametrize("kind", backbones.MODELS)
def test_static_caches_on_every_backbone(kind: str, tmp_path: Any) -> None:
    """Windows too: a static cache makes transformers build masks of several kinds."""
    folder = backbones.save_base(kind, tmp_path / "base")
    model = backbone_class(folder).from_pretrained(folder, config=load_config(folder)).eval()
    ids = torch.randint(3, 250, (2, 11), generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        model.generate(ids, cache_implementation="static", **FIXED),
        model.generate(ids, **FIXED),
    )


@each_host
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_a_cache_of_the_callers_under_either_name(host: str, options: dict[str, Any]) -> None:
    model, batch = load(host), prompts()
    expected = generate(model, batch, **options)
    for name in ("cache", "past_key_values"):
        cache = model.extensions.make_cache(model)
        cache = DynamicCache(config=model.config) if cache is None else cache
        assert torch.equal(generate(model, batch, **options, **{name: cache}), expected)
        assert cache.get_seq_length() > batch.ids.shape[1], "the cache must have been filled"


def one_row(model: Any, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    row = prompts().rows[0][None]
    return row, {"images": images.to(model.dtype)}


@each_host
def test_a_filled_cache_is_continued(host: str) -> None:
    """The second turn reads the cache of the first, and answers as if it had read the whole conversation."""
    model, images = load(host), prompts().images[:1]
    row, arguments = one_row(model, images)
    first = model.generate(row, **arguments, **FIXED, return_dict_in_generate=True)
    cache = cache_of(first)
    stored = cache.get_seq_length()
    follow = torch.tensor([[31, 7, 60]])
    whole = torch.cat([row, first.sequences, follow], dim=1)
    with monkey_forward(model) as lengths:
        continued = model.generate(whole, **arguments, **FIXED, cache=cache)
    assert lengths[0] == whole.shape[1] - row.shape[1] - 5, "only what the cache does not hold may be computed"
    assert cache.get_seq_length() > stored
    if host == "dynamic":  # a later turn is judged by itself: the same as feeding it to the model
        expected = by_hand(model, row, arguments, [first.sequences, follow])
    else:
        expected = model.generate(whole, **arguments, **FIXED)
    assert torch.equal(continued, expected)
    if host != "dynamic":
        other = model.generate(whole, images=-arguments["images"], **FIXED)
        assert not torch.equal(expected, other), "the image must matter"


class monkey_forward:  # noqa: N801 (a context manager that reads as a verb)
    """Notes how many positions each pass of the decoder gets."""

    def __init__(self, model: Any) -> None:
        self.decoder, self.lengths = model.get_decoder(), []

    def __enter__(self) -> list[int]:
        self.hook = self.decoder.layers[0].register_forward_pre_hook(
            lambda layer, args: self.lengths.append(args[0].shape[1])
        )
        return self.lengths

    def __exit__(self, *error: Any) -> None:
        self.hook.remove()


def by_hand(model: Any, row: Tensor, arguments: dict[str, Any], turns: list[Tensor]) -> Tensor:
    """Greedy tokens after feeding a prompt, its answer token by token, and a later turn at once."""
    cache = model.extensions.make_cache(model)
    with torch.no_grad():
        model(input_ids=row, **arguments, cache=cache, use_cache=True)
        answer, follow = turns
        for token in answer[0, :-1]:
            model(input_ids=token.reshape(1, 1), cache=cache, use_cache=True)
        out = model(input_ids=torch.cat([answer[:, -1:], follow], dim=1), cache=cache, use_cache=True)
        new = [out.logits[0, -1].argmax()]
        while len(new) < FIXED["max_new_tokens"]:
            new.append(model(input_ids=new[-1].reshape(1, 1), cache=cache, use_cache=True).logits[0, -1].argmax())
    return torch.stack(new)[None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, r"num_beams=2\) cannot continue"),
        ({"num_return_sequences": 2, "do_sample": True}, r"num_return_sequences=2\) cannot continue"),
    ],
)
def test_continuing_is_refused_where_rows_would_part(options: dict[str, Any], message: str) -> None:
    model = load("llava")
    row, arguments = one_row(model, prompts().images[:1])
    cache = cache_of(model.generate(row, **arguments, **FIXED, return_dict_in_generate=True))
    whole = torch.cat([row, torch.full((1, 9), 7)], dim=1)
    with pytest.raises(FlagError, match=message):
        model.generate(whole, **arguments, cache=cache, **{**FIXED, **options})
    with pytest.raises(FlagError, match=r"the cache holds \d+ positions, but the prompt has \d+"):
        model.generate(row, **arguments, cache=cache, **FIXED)
    batch = prompts()
    filled = cache_of(generate(model, batch, return_dict_in_generate=True))
    longer = Prompts(
        batch.rows,
        batch.images_of_rows,
        torch.cat([batch.ids, torch.full((3, 9), 7)], dim=1),
        torch.cat([batch.mask, torch.ones(3, 9, dtype=torch.long)], dim=1),
    )
    with pytest.raises(FlagError, match="one by one"):
        generate(model, longer, cache=filled)


def test_caches_that_contradict_other_options() -> None:
    model, batch = load("llava"), prompts()
    with pytest.raises(FlagError, match="use_cache=False"):
        generate(model, batch, use_cache=False, cache=DynamicCache(config=model.config))
    with pytest.raises(FlagError, match="use_cache=False"):
        generate(model, batch, use_cache=False, cache_implementation="static")
    with pytest.raises(FlagError, match="needs its own cache"):
        generate(load("dynamic"), batch, cache_implementation="static")


@each_host
def test_sampling_one_token_is_greedy(host: str) -> None:
    model, batch = load(host), prompts()
    expected = generate(model, batch)
    drawn = generate(model, batch, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(drawn[::2], expected)
    assert torch.equal(drawn[1::2], expected)


KEY = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("past_key_value", DynamicCache()),
        ("layer_past", DynamicCache()),
        ("past_key_values", ((KEY, KEY),)),
        ("cache", [(KEY, KEY)]),
        ("past", ((KEY, KEY), (KEY, KEY))),
        ("kv_cache", DynamicCache()),
    ],
)
@pytest.mark.parametrize("method", ["forward", "generate", "decoder"])
def test_what_looks_like_a_cache_is_refused(method: str, name: str, value: Any) -> None:
    model, ids = load("llava"), torch.tensor([[5, 9]])
    call = {"forward": model, "generate": model.generate, "decoder": model.get_decoder()}[method]
    with pytest.raises(TypeError, match=f"(?i){name}.*cache"):
        call(ids, **{name: value})
    with pytest.raises(TypeError, match="mean the same"):
        call(ids, cache=DynamicCache(), past_key_values=DynamicCache())


def test_text_alone_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream cuts where it splices images in; a prompt of text alone is as long as it is, generated or scored."""
    model, ids = load("llava"), torch.arange(5, 35)[None]
    free = model.generate(ids, **FIXED)
    scores = model(ids, labels=ids)
    limit = 12
    monkeypatch.setattr(model.config, "tokenizer_model_max_length", limit, raising=False)
    assert torch.equal(model.generate(ids, **FIXED), free)
    assert model(ids, labels=ids).logits.shape == scores.logits.shape
    assert model.build_inputs(prompts().rows[0][None], images=prompts().images[:1]).inputs_embeds.shape[1] == limit
    mixed = torch.cat([ids, ids])
    cut = model.build_inputs(mixed, images=torch.cat([prompts().images[:1]] * 2))  # dummies make it a batch with images
    assert cut.inputs_embeds.shape[1] == limit
