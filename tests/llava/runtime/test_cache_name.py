"""The name of the cache is read from the function that is called, and known nowhere else."""

from __future__ import annotations

import io
import tokenize
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llava.runtime.cache_name import (
    INSTALLED_NAME,
    NAMES,
    cache_argument,
    cache_keyword,
    cache_of,
    layer_cache_keyword,
    takes_cache,
)

pytestmark = pytest.mark.versions

PACKAGES = ("llava", "hydralora", "dynamic", "mma", "playground", "benchmarks", "scripts")


def old(ids: Any, past_key_values: Any = None) -> Any:
    return past_key_values


def new(ids: Any, cache: Any = None) -> Any:
    return cache


@pytest.mark.parametrize(("function", "name"), [(old, "past_key_values"), (new, "cache")])
def test_the_signature_decides(function: Any, name: str) -> None:
    cache = DynamicCache()
    assert cache_keyword(function) == name
    assert function(1, **cache_argument(function, cache)) is cache
    with pytest.raises(TypeError, match="len has no argument named cache or past_key_values"):
        cache_keyword(len)


def test_the_installed_functions_agree() -> None:
    called = (create_causal_mask, BaseModelOutputWithPast, LlamaDecoderLayer.forward, GenerationMixin._prefill)
    assert {cache_keyword(function) for function in called[:3]} == {INSTALLED_NAME}
    output = BaseModelOutputWithPast(**cache_argument(BaseModelOutputWithPast, DynamicCache()))
    assert isinstance(cache_of(output), DynamicCache)
    assert cache_of(SimpleNamespace(cache=1)) is None


def test_a_layer_that_passes_arguments_on_is_looked_through() -> None:
    class Outer(LlamaDecoderLayer):
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states, **kwargs)

    assert layer_cache_keyword(Outer.__new__(Outer)) == INSTALLED_NAME
    with pytest.raises(TypeError, match=r"Linear\.forward"):
        layer_cache_keyword(nn.Linear(2, 2))


def test_both_names_reach_a_function_of_ours() -> None:
    class Host:
        @takes_cache
        def run(self, ids: Any, cache: Any = None, **kwargs: Any) -> Any:
            return cache, kwargs

    cache, tensors = DynamicCache(), (torch.zeros(2), torch.zeros(3))
    for name in NAMES:
        assert Host().run(1, **{name: cache}, images=tensors) == (cache, {"images": tensors})
    assert Host().run(1, past_key_values=None, cache=cache)[0] is cache
    assert cache_keyword(Host.run) == INSTALLED_NAME, "transformers reads the signature"
    for kwargs in ({"past": cache}, {"cache": 5}, {"cache": cache, "past_key_values": cache}):
        with pytest.raises(TypeError, match="cache"):
            Host().run(1, **kwargs)


def names_in(source: str) -> set[str]:
    """Names and strings of a program, comments and docstrings left out."""
    found: set[str] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            found.add(token.string)
        elif token.type == tokenize.STRING and not token.string.startswith(('"""', 'r"""')):
            found.add(token.string.strip("\"'"))
    return found


def test_no_other_module_knows_the_old_name(repository: Path) -> None:
    here = {path for package in PACKAGES for path in (repository / package).rglob("*.py")}
    knowing = {str(path.relative_to(repository)) for path in here if "past_key_values" in names_in(path.read_text())}
    # The method of PEFT refuses what a model of any library remembers under these names.
    assert knowing == {"llava/runtime/cache_name.py", "hydralora/tuner/caches.py"}
