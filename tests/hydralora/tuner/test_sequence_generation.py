"""Routing by sequence in generation: a table of models times the ways in which a prompt can be read and continued.

Whatever the way, the prompt alone decides: the logits of every step are those of plain generation with a cache, and
those of one pass over the whole text whose labels say where the prompt ends.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, StaticCache

from hydralora import forced_routing
from hydralora.tuner.sequence import RoutingBySequenceError
from tests.hydralora.tuner.hosts import HOSTS, tiny_rwkv
from tests.hydralora.tuner.models import adapted, tiny_llama

IDS = torch.randint(3, 80, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :3], MASK[2, :1] = 0, 0
PROMPTS = {"input_ids": IDS * MASK, "attention_mask": MASK}
NEW = 5
FIXED: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}
TOLERANCE = 5e-6  # measured: up to 1.3e-6 (T5), 2e-7 elsewhere

each_host = pytest.mark.parametrize("host", HOSTS)


def steps(model: Any, inputs: dict[str, Tensor] = PROMPTS, **options: Any) -> Tensor:
    """Logits of each step, (B, NEW, V)."""
    return torch.stack(model.generate(**inputs, **FIXED | LOGITS | options).logits, dim=1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


WAYS: dict[str, dict[str, Any]] = {
    "without a cache": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 3},
    "in chunks by configuration": {},
    "static cache": {"cache_implementation": "static"},
}
NOT_FOR = {("mamba", "in chunks"), ("mamba", "in chunks by configuration")}  # transformers cannot


@each_host
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_reading_a_prompt(host: str, way: str) -> None:
    if (host, way) in NOT_FOR or (HOSTS[host].pair and "chunks" in way):
        pytest.skip("transformers itself does not read these prompts in chunks")
    model = HOSTS[host].adapted()
    expected = steps(model)
    if "configuration" in way:
        model.generation_config.prefill_chunk_size = model.get_base_model().generation_config.prefill_chunk_size = 3
    close(steps(model, **WAYS[way]), expected)


@each_host
def test_rows_do_not_depend_on_their_neighbors(host: str) -> None:
    """Alone as in a batch padded on the left."""
    model = HOSTS[host].adapted()
    together = steps(model)
    for row in range(3) if host != "bart" else [0]:  # its positions count padding
        alone = IDS[row : row + 1, int((MASK[row] == 0).sum()) :]
        close(steps(model, {"input_ids": alone, "attention_mask": torch.ones_like(alone)}), together[row : row + 1])


@each_host
def test_the_prompt_of_a_generation_is_the_prompt_of_labels(host: str) -> None:
    """What is generated is what was trained: one pass whose labels begin behind the prompt gives the same logits."""
    model = HOSTS[host].adapted()
    prompts = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    output = model.generate(**prompts, **FIXED, **LOGITS)
    generated = output.sequences[:, -NEW:]
    if HOSTS[host].pair:
        batch = {**prompts, "labels": generated.contiguous()}
        columns = slice(0, NEW)
    else:
        whole = output.sequences
        labels = torch.cat([torch.full_like(IDS, -100), generated], dim=1)
        batch = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "labels": labels}
        columns = slice(IDS.shape[1] - 1, -1)
    with torch.no_grad():
        close(model(**batch).logits[:, columns], torch.stack(output.logits, dim=1))
        # The negative control: decided by all tokens, the logits are others.
        everything = {**batch, "prompt_mask": torch.ones_like(batch["labels"])}
        assert not torch.allclose(model(**everything).logits, model(**batch).logits, atol=1e-3)


@each_host
def test_beams(host: str) -> None:
    """Beams with a cache, whose rows move, and without one; the best are those of each prompt alone."""
    model = HOSTS[host].adapted()
    options = FIXED | {"num_beams": 3}
    found = model.generate(**PROMPTS, **options)
    assert torch.equal(found, model.generate(**PROMPTS, use_cache=False, **options))
    alone = model.generate(input_ids=IDS[:1], attention_mask=MASK[:1], **options)
    assert torch.equal(found[:1], alone)


@pytest.mark.parametrize("host", ["llama", "opt", "t5", "bart"])
@pytest.mark.parametrize("assistant", ["another model", "itself", "prompt lookup"])
def test_assisted_decoding(host: str, assistant: str) -> None:
    """Proposed tokens are in the first pass too, and decide nothing."""
    if (host, assistant) == ("bart", "prompt lookup"):
        pytest.skip("its decoder starts with the end of a sequence, at which transformers 5.17 stops looking up")
    model = HOSTS[host].adapted()
    prompt = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
    other = HOSTS[host].make().eval() if assistant == "another model" else HOSTS[host].adapted().get_base_model()
    options = {"prompt_lookup_num_tokens": 2} if assistant == "prompt lookup" else {"assistant_model": other}
    close(steps(model, prompt, **options), steps(model, prompt))


def test_a_conversation_that_continues(caplog: pytest.LogCaptureFixture) -> None:
    """The cache of a first turn does not decide for a second one: the whole text is read again, and that is said."""
    model = adapted(routing="sequence")
    first = model.generate(input_ids=IDS[:1], **FIXED, **LOGITS)
    turn = {"input_ids": torch.cat([first.sequences, IDS[1:2]], dim=1)}
    expected = steps(model, turn)
    name = next(name for name in ("cache", "past_key_values") if name in first)
    with caplog.at_level(logging.WARNING):
        close(steps(model, turn, **{name: first[name]}), expected)
    assert "the whole prompt is read again" in caplog.text
    new = {"input_ids": IDS[1:2], "attention_mask": torch.ones_like(turn["input_ids"])}
    with pytest.raises(RoutingBySequenceError, match="tokens that follow a filled cache"):
        steps(model, new, **{name: copy.deepcopy(first[name])})


def test_an_empty_cache_of_the_caller() -> None:
    model = adapted(routing="sequence")
    cache = StaticCache(config=model.config, max_cache_len=16)
    name = next(name for name in ("cache", "past_key_values") if name in model.generate(**PROMPTS, **FIXED, **LOGITS))
    close(steps(model, **{name: cache}), steps(model))


def test_guidance() -> None:
    """The unconditional passes have a prompt of their own; without a cache they would read what was generated."""
    model = adapted(routing="sequence")
    prompt = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
    negative = {"negative_prompt_ids": IDS[1:2], "guidance_scale": 1.5}
    scores = lambda **options: model.generate(**prompt, **FIXED, **options)  # noqa: E731
    assert torch.equal(scores(**negative), scores(**negative))
    with pytest.raises(RoutingBySequenceError, match="guidance_scale with use_cache=False"):
        scores(**negative, use_cache=False)


@pytest.mark.parametrize("way", ["folder", "load_adapter"])
def test_the_integration_of_transformers(way: str, tmp_path: Path) -> None:
    """An adapter in a model of transformers, without PEFT's model around it; with a cache and without."""
    model = adapted(routing="sequence")
    expected = steps(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tiny_llama().save_pretrained(tmp_path / "base")
    if way == "folder":
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(
            config.read_text()
            .replace('"base_model_name_or_path": ""', f'"base_model_name_or_path": "{tmp_path}/base"')
            .replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{tmp_path}/base"')
        )
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        plain.load_adapter(str(tmp_path / "adapter"))
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
        close(steps(plain.eval(), **options), expected)


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda n=n, job=job: results.update({n: job()})) for n, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(jobs))]


@pytest.mark.parametrize("host", ["llama", "mamba", "t5"])
def test_concurrent_requests(host: str) -> None:
    """Twelve generations of one model at the same time, with caches and without, of prompts of many lengths."""
    model = HOSTS[host].adapted()
    requests = []
    for number in range(12):
        ids = IDS.flatten()[number : number + 3 + number % 5][None]
        requests.append(({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"use_cache": number % 2 == 0}))
    expected = [steps(model, inputs, **options) for inputs, options in requests]
    found = at_once(*(lambda i=i, o=o: steps(model, i, **o) for i, o in requests))
    for one, wanted in zip(found, expected, strict=True):
        close(one, wanted)


def test_a_generation_within_a_generation() -> None:
    """A processor of logits calls the model and generates with it: neither takes anything from the other."""
    model = adapted(routing="sequence")
    other = {"input_ids": IDS[1:2, 2:], "attention_mask": MASK[1:2, 2:]}
    expected, expected_inner = steps(model), steps(model, other)
    with torch.no_grad():
        expected_pass = model(input_ids=IDS[:1]).logits
    seen = []

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((steps(model, other), model(input_ids=IDS[:1]).logits))
        return scores

    close(steps(model, logits_processor=[process]), expected)
    assert len(seen) == NEW
    for inner, one in seen:
        close(inner, expected_inner)
        close(one, expected_pass)


def test_states_that_carry_no_weights() -> None:
    """In a generation it is known what is generated, whatever a model remembers; by hand it is not, and refused."""
    model = adapted(base=tiny_rwkv(), target_modules=["key", "value"], routing="sequence")
    prompt = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
    close(steps(model, prompt), steps(model, prompt, use_cache=False))
    with torch.no_grad():
        state = model(input_ids=IDS[:1], use_cache=True).state
        with pytest.raises(RoutingBySequenceError, match="continues from 'state'"):
            model(input_ids=IDS[:1, :1], state=state)


def test_continuous_batching_is_refused_where_it_would_lose_the_routing() -> None:
    """Before it starts: what fails in its thread is only logged, and no answer comes."""
    refused = {"sequence": adapted(routing="sequence"), "task": adapted(routing="task", tasks=["law", "maths"])}
    for unit, model in refused.items():
        with pytest.raises(ValueError, match=f"generate_batch: adapter 'default' routes by {unit}"):
            model.generate_batch([[5, 9, 31], [8, 3]])
        with model.disable_adapter():
            assert model.init_continuous_batching()
    token = adapted()
    with forced_routing(token, expert=1), pytest.raises(ValueError, match="another one, where it would not hold"):
        token.generate_batch([[5, 9, 31], [8, 3]])
    token.add_adapter("other", token.peft_config["default"])
    token.delete_adapter("other")
    with forced_routing(token, expert=1), pytest.raises(ValueError, match="another one, where it would not hold"):
        token.generate_batch([[5, 9, 31], [8, 3]])
    for asked in ({"expert": 1}, {"routing_weights": [0.2, 0.5, 0.3]}, {"tasks": ["law"]}):
        with pytest.raises(ValueError, match=f"generate_batch: {next(iter(asked))} would not reach the layers"):
            token.generate_batch([[5, 9, 31], [8, 3]], **asked)
    assert not {"init_continuous_batching", "generate_batch"} & vars(token.unload()).keys()


def test_continuous_batching_by_token() -> None:
    model, prompts = adapted(), [[5, 9, 31, 7, 60], [8, 3, 44]]
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=79, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, page_size=32, max_batch_tokens=32, use_cuda_graph=False)
    answers = model.generate_batch(prompts, generation_config=options, continuous_batching_config=small)
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        alone = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=options
        )
        assert answer.generated_tokens == alone[0, len(prompt) :].tolist()
