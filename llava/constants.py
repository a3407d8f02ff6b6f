"""Ids and literal token strings that data files and checkpoints depend on (upstream `llava/constants.py`)."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30  # seconds
WORKER_HEART_BEAT_INTERVAL = 15  # seconds
LOGDIR = "."

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""

IMAGE_TOKEN_INDEX = -200
"""Id that stands for one image in `input_ids`; replaced by the image's features when the embeddings are built."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that weights are stored and loaded in; torch's attributes of the same names."""

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
"""Values of `--mm_patch_merge_type`; `llava/model/tiles.py` carries them out."""
