"""Extensions of llava-extensions in this checkout of upstream's LLaVA, put here by moe_patch.

`train.py` and `builder.py` call the functions below in the lines that end with `# moe_patch`; see `seams.py`. Imports
torch, and transformers and PEFT where they are used; written for those of upstream's pins and for later ones.
"""

from moe_patch.payload.seams import (
    Flags,
    attach,
    attach_beside_tower,
    carries,
    choose_lora_modules,
    configure,
    load,
    model_name,
    prepare_trainer,
    save,
    write,
    writes_itself,
)

__all__ = [
    "Flags",
    "attach",
    "attach_beside_tower",
    "carries",
    "choose_lora_modules",
    "configure",
    "load",
    "model_name",
    "prepare_trainer",
    "save",
    "write",
    "writes_itself",
]
