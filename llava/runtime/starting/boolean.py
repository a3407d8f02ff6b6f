"""The type of an option that is True or False, as transformers' parser reads it."""

from __future__ import annotations


def boolean(text: str) -> bool:
    """True or False by the words of transformers' own parser, which is imported when an option is given.

    Raises:
        argparse.ArgumentTypeError: it is none of them.
    """
    from transformers.hf_argparser import string_to_bool

    return bool(string_to_bool(text))
