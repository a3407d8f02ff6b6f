"""A text model with a HydraLoRA adapter as OpenCompass sees it; used by `mmlu.py` next to this file.

It is OpenCompass's class for base models of transformers. What differs: the adapter may be ours or the original's, no
code of a checkpoint is run, and the tokenizer gets a method back that transformers 5 no longer has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opencompass.models import HuggingFaceBaseModel
from transformers import AutoModelForCausalLM

from hydralora.tuner.loading import load_adapter


class AdaptedModel(HuggingFaceBaseModel):
    """A causal language model of transformers, with an adapter if `peft_path` names one."""

    def _load_tokenizer(self, path: str | None, kwargs: dict[str, Any], pad_token_id: int | None = None) -> None:
        super()._load_tokenizer(path, {"trust_remote_code": False} | kwargs, pad_token_id)
        # OpenCompass 0.5.4 calls it under the name that it had before transformers 5.
        self.tokenizer.batch_encode_plus = self.tokenizer.__call__

    def _load_model(
        self,
        path: str,
        kwargs: dict[str, Any],
        peft_path: str | None = None,
        peft_kwargs: dict[str, Any] | None = None,
    ) -> None:
        options = {"dtype": "auto", "device_map": "auto"} | kwargs
        self.model = AutoModelForCausalLM.from_pretrained(path, **options)
        if peft_path is not None:
            self.model = load_adapter(self.model, Path(peft_path))
        self.model.eval()
        self.model.generation_config.do_sample = False
