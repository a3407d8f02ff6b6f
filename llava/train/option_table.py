"""What becomes of transformers' options in `python -m llava.train.train`: the common table, and compiled layers."""

from __future__ import annotations

from llava.runtime.trainer_options import values
from llava.runtime.trainer_options.row import Table, but, supported
from llava.runtime.trainer_options.table import TABLE

BACKENDS = ("inductor", "aot_eager")
"""Values of `--torch_compile_backend`. Both compute checkpointed layers again with the draws of the forward pass."""

MODES = ("default", "max-autotune-no-cudagraphs")
"""Values of `--torch_compile_mode`. The others record CUDA graphs, one for each length."""

LLAVA_OPTIONS: Table = but(
    TABLE,
    supported(
        "torch_compile",
        "torch: the layers of decoder and tower are compiled in their places, for any length (performance.md)",
        limits="not together with `--deepspeed`, `--fsdp` or `--bits` 4 or 8; transformers allows TF32 with it",
    ),
    supported(
        "torch_compile_backend",
        "torch; switches `--torch_compile` on; not given: inductor",
        values.one_of("torch_compile_backend", BACKENDS, "others are not tested"),
        f"one of {', '.join(BACKENDS)}",
    ),
    supported(
        "torch_compile_mode",
        "torch; switches `--torch_compile` on",
        values.one_of("torch_compile_mode", MODES, "the others record a CUDA graph for each length of a batch"),
        f"one of {', '.join(MODES)}",
    ),
)
