"""Token ids by which a later user turn is found in a prompt (`Segments.last_instruct`).

The original of Dynamic-LLaVA has the two ids of Llama's "USER:" written down; here they follow from the template of the
run and its tokenizer.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from llava.conversation import Conversation
from llava.errors import BadSampleError

QUESTION = "Q"


def user_marker_ids(template: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids with which `template` opens a second user turn, as they stand in the middle of a prompt.

    Returns:
        For the v1 templates and Llama's tokenizer [11889, 29901]. Empty if nothing marks a turn, as in the plain
        templates: the whole text after the last image counts as the last instruction then.
    """
    conversation = template.copy()
    user, assistant = conversation.roles
    for role, text in ((user, "a"), (assistant, "b"), (user, QUESTION), (assistant, None)):
        conversation.append_message(role, text)
    try:
        pieces = conversation.pieces()
    except BadSampleError:
        return []  # a template of one turn
    last_answer = max(index for index, piece in enumerate(pieces) if piece.trained)
    before = "".join(piece.text for piece in pieces[: last_answer + 1])
    opening = "".join(piece.text for piece in pieces[last_answer + 1 :]).partition(QUESTION)[0].rstrip(" ")
    if not opening:
        return []
    ids = tokenizer(before + opening, add_special_tokens=False).input_ids
    head = tokenizer(before, add_special_tokens=False).input_ids
    # The last piece of the answer's end and the first of the opening may be one token ("><" of the mpt templates).
    differing = (place for place, (one, other) in enumerate(zip(ids, head, strict=False)) if one != other)
    shared = next(differing, len(head))
    return list(ids[shared:])
