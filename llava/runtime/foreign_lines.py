"""Lines of dependencies that nobody who starts a program can use, dropped by the loggers that write them.

Each entry names one logger, or one module that warns, and the beginning of one message; everything else stays.
`llava/__init__.py` calls `drop_foreign_lines` before anything that would import the dependency.
"""

from __future__ import annotations

import logging
import re
import warnings

FOREIGN_LINES = {
    # On every CPU with AVX512-BF16, whether or not anything is quantised: an optional kernel is fetched from the hub.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    # In runs without DeepSpeed too: accelerate imports it wherever it is installed.
    "DeepSpeed": "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
}

FOREIGN_WARNINGS = {
    # PEFT reads the old name whenever it wraps a model; nothing here does.
    "transformers.modeling_utils": (FutureWarning, "`is_gradient_checkpointing` is deprecated"),
}
"""By module: the category and how the message begins."""


class ForeignLine(logging.Filter):
    """Holds back the records whose message begins in one way."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        """False for the one message."""
        return not str(record.msg).startswith(self.start)


def drop_foreign_lines() -> None:
    """Hold back `FOREIGN_LINES` and `FOREIGN_WARNINGS`; once, however often it is called."""
    for name, start in FOREIGN_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, ForeignLine) and one.start == start for one in logger.filters):
            logger.addFilter(ForeignLine(start))
    for module, (category, start) in FOREIGN_WARNINGS.items():
        warnings.filterwarnings("ignore", re.escape(start), category, rf"{re.escape(module)}\Z")
