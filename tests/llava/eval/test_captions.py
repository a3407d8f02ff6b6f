"""CIDEr and BLEU through pycocoevalcap: known extremes, and COCO's tokenizer."""

from __future__ import annotations

import shutil

import pytest

from llava.errors import BadSampleError, FlagError
from llava.eval.m4c_evaluator import TextCapsBleu4Evaluator
from llava.eval.scoring.captions import bleu4, cider, pair, tokenize

REFERENCES = [
    ["A man rides a brown horse.", "The man is riding a horse on a beach."],
    ["Two dogs play in the snow.", "Two black dogs are playing in deep snow."],
    ["A plate of food on a table.", "There is a plate with food on the wooden table."],
]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="COCO's tokenizer needs Java; there is none")


@pytest.fixture(autouse=True)
def _library() -> None:
    pytest.importorskip("pycocoevalcap", reason="the extra `eval` is not installed")


def test_cider_tells_right_from_wrong() -> None:
    right = [texts[0] for texts in REFERENCES]
    captions = pair(right, REFERENCES, "plain")
    good, each = cider(captions)
    swapped, _ = cider(pair([*right[1:], right[0]], REFERENCES, "plain"))
    assert good == pytest.approx(sum(each) / 3)
    assert good > 3 > 0.1 > swapped
    assert bleu4(captions) == pytest.approx(1.0, abs=1e-6)


@needs_java
def test_the_tokenizer_of_coco(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenize(["A man's dog, isn't it?\nNo!", "", "Two-way (street) café."]) == [
        "a man 's dog is n't it no",
        "",
        "two-way -lrb- street -rrb- café",  # COCO's list of punctuation has these in capitals
    ]
    items = [{"pred_answer": texts[0], "gt_answers": texts} for texts in REFERENCES]
    assert TextCapsBleu4Evaluator().eval_pred_list(items) == pytest.approx(1.0, abs=1e-6)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FlagError, match="no `java` on PATH"):
        tokenize(["a"])


def test_wrong_uses_are_refused() -> None:
    with pytest.raises(BadSampleError, match="2 captions for 3 images"):
        pair(["a", "b"], REFERENCES, "plain")
    with pytest.raises(BadSampleError, match="no reference"):
        pair(["a"], [[]], "plain")
    with pytest.raises(FlagError, match="--tokenizer words"):
        tokenize(["a"], "words")
