"""Makes HydraLoRA known to PEFT as the method HYDRALORA, from outside PEFT.

PEFT's own `register_peft_method` takes only names that its closed enumeration `PeftType` has, so the enumeration gets
one more member first. A process that reads such an adapter must have imported `hydralora`.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "HYDRALORA"
PREFIX = "lora_"
"""Beginning of the name of everything that the method adds to a layer: LoRA's, for what looks for it, such as LoRA+."""


def peft_type() -> Any:
    """The member `PeftType.HYDRALORA`, created if it does not exist yet."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
        type.__setattr__(PeftType, NAME, member)
    return PeftType[NAME]


def register(config_class: type, model_class: type) -> None:
    """Register the method; a second call with the same classes does nothing.

    Raises:
        RuntimeError: PEFT has a method of this name with other classes, for example one of its own.
    """
    member = peft_type()
    known = (PEFT_TYPE_TO_CONFIG_MAPPING.get(member), PEFT_TYPE_TO_TUNER_MAPPING.get(member))
    if known == (config_class, model_class):
        return
    if known != (None, None):
        raise RuntimeError(
            f"PEFT has a method {NAME} already, of the classes {known}; two implementations cannot live in one process"
        )
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix=PREFIX)
