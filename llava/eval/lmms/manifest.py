"""Makes our models known to lmms-eval: `python -m lmms_eval --model llava_extensions --model_args pretrained=FOLDER`.

lmms-eval calls `manifest` through the entry point in `pyproject.toml` each time it starts, so nothing large is imported
here. The model is in `model.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "llava_extensions"
"""Not `llava`, which is lmms-eval's own wrapper of upstream's LLaVA."""


def manifest() -> ModelManifest:
    """What lmms-eval has to know: the name of the model, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path="llava.eval.lmms.model.LlavaExtensions")
