"""What the server assumes where a request says nothing, and what a request may ask for at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing, and the limits of the server.

    Attributes:
        temperature: of sampling; 0 is greedy.
        max_new_tokens: tokens of an answer.
        token_limit: the most that a request may ask for.
        max_images: images of one request.
        max_prompt_chars: characters of all texts of a request, counted before they are tokenized.
        images_first: put the images of a message before its text, as transformers' template of LLaVA-1.5 does, in
            place of keeping the order of the parts.
    """

    temperature: float = 0.2
    max_new_tokens: int = 512
    token_limit: int = 4096
    max_images: int = 16
    max_prompt_chars: int = 200_000
    images_first: bool = False
