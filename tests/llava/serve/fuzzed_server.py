"""The server that the fuzz tests ask: a tiny model, and limits that small requests reach."""

from __future__ import annotations

from pathlib import Path

from llava.eval.answering.loading import LoadedModel, load_model
from llava.serve.app import Settings
from llava.serve.body import BodyLimits
from llava.serve.defaults import Defaults
from llava.serve.image_urls import ImagePolicy
from tests.golden import golden_dir

MODEL = "tiny-llava-v1.5"


def load_tiny() -> LoadedModel:
    """The model."""
    return load_model(str(golden_dir("llava") / MODEL), device="cpu")


def settings(folder: Path) -> Settings:
    """Limits; images come from `folder`, and from one host, where nobody listens."""
    return Settings(
        "vicuna_v1",
        Defaults(temperature=0.0, max_new_tokens=2, token_limit=8, max_images=3),
        ImagePolicy(max_pixels=1_000_000, folder=folder, hosts=frozenset({"127.0.0.1:9"}), seconds=1.0),
        seconds=30.0,
        body=BodyLimits(max_bytes=2**21),
    )
