"""What a command line says about the base weights; nothing here needs torch."""

from __future__ import annotations

from enum import StrEnum


class VicunaKind(StrEnum):
    """How a Vicuna is stored, and how a difference is added."""

    FULL = "full"
    DELTA = "delta"
    ORIGINAL = "original"


BITS = {"4bit": 4, "8bit": 8, "16bit": 16}
"""Values of `--bits` in training, by name."""

AUTO = "auto"

VICUNA_CHOICES = (AUTO, *VicunaKind)
"""Values of `--vicuna_weights`."""

VICUNA_HELP = (
    "what vicuna_<llm_model> holds: full weights or the difference to LLaMA; auto: found from the weights; original: "
    "the difference, added as LaVIN's own code adds it, for adapters that it trained on Vicuna"
)
"""The same for every program that has the option."""
