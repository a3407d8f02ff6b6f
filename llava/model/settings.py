"""What the configuration files of a LLaVA, its tower and its image processor must say, and in which range.

The rules of language models, and the check itself, are in `llava/runtime/weights/settings.py`.
"""

from __future__ import annotations

from llava.data.pixels import ASPECT_RATIOS
from llava.runtime.weights.settings import COUNT, SIZE, TOKEN, Rule, Rules

VISION_KEYS: Rules = {
    "mm_vision_tower": Rule("str"),
    "mm_vision_tower_sha256": Rule("str"),
    "mm_vision_tower_from": Rule("str"),
    "mm_hidden_size": Rule("int", 1, SIZE),
    "mm_vision_select_layer": Rule("int", -COUNT, COUNT),
    "mm_vision_select_feature": Rule("str"),
    "mm_projector_type": Rule("str"),
    "mm_patch_merge_type": Rule("str"),
    "mm_image_normalization": Rule("str"),
    "mm_use_im_start_end": Rule("bool"),
    "mm_use_im_patch_token": Rule("bool"),
    "use_mm_proj": Rule("bool"),
    "tune_mm_mlp_adapter": Rule("bool"),
    "image_aspect_ratio": Rule("str", choices=tuple(ASPECT_RATIOS)),
    "max_sequence_length": Rule("int", 1, TOKEN),
    "tokenizer_model_max_length": Rule("int", 1, TOKEN),
    "tokenizer_padding_side": Rule("str", choices=("left", "right")),
    "user_marker_ids": Rule("list of ids", 0, TOKEN),
    "conversation_template": Rule("str"),
    "conversation_chat_template": Rule("str"),
}
"""What a LLaVA's has in addition."""


VISION_TOWER: Rules = {
    "hidden_size": Rule("int", 1, SIZE, required=True),
    "intermediate_size": Rule("int", 1, 8 * SIZE, required=True),
    "num_hidden_layers": Rule("int", 1, COUNT, required=True),
    "num_attention_heads": Rule("int", 1, COUNT, required=True),
    "image_size": Rule("int", 1, 2**14, required=True),
    "patch_size": Rule("int", 1, 2**12, required=True),
    "layer_norm_eps": Rule("float", 1e-12, 1e-2, required=True),
    "hidden_act": Rule("str", required=True),
    "num_channels": Rule("int", 3, 3),
    "attention_dropout": Rule("float", 0, 1),
}
"""`config.json` of a CLIP or SigLIP vision model by itself."""


IMAGE_PROCESSOR: Rules = {
    "do_resize": Rule("bool", required=True),
    "do_normalize": Rule("bool", required=True),
    "do_rescale": Rule("bool"),
    "rescale_factor": Rule("float", 1e-6, 1),
    "resample": Rule("int", 0, 5, required=True),
    "image_mean": Rule("floats", -10, 10, required=True),
    "image_std": Rule("floats", 1e-3, 10, required=True),
    "do_center_crop": Rule("bool"),
    "do_convert_rgb": Rule("bool"),
    "size": Rule("pixels", 1, 2**14, required=True),
    "crop_size": Rule("pixels", 1, 2**14),
}
"""`preprocessor_config.json`; what it makes is checked against the tower."""
