"""Scores of captions: CIDEr and BLEU of COCO's evaluation, by pycocoevalcap.

Captions are cut into words by Stanford's PTB tokenizer, as COCO's own server does; it is a Java program that comes with
pycocoevalcap. Without Java, `tokenizer="plain"` cuts with a regular expression: near, but not the published measure.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError, FlagError

TOKENIZERS = ("ptb", "plain")
JAR = "stanford-corenlp-3.4.1.jar"
PTB_CLASS = "edu.stanford.nlp.process.PTBTokenizer"
WORD = re.compile(r"[a-z0-9]+(?:[-.][a-z0-9]+)*|'(?:s|re|ve|d|ll|m)\b|n't", re.IGNORECASE)


@dataclass(frozen=True)
class Captions:
    """Tokenized captions of N images in pycocoevalcap's form, by the image's position; made by `pair`."""

    references: dict[int, list[str]]
    predictions: dict[int, list[str]]


def pair(predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "ptb") -> Captions:
    """Tokenize one caption and the annotators' captions of each of N images, all at once.

    Raises:
        FlagError: unknown tokenizer, or pycocoevalcap or Java is missing.
        BadSampleError: the numbers of predictions and references differ, or an image has no reference.
    """
    if len(predictions) != len(references):
        raise BadSampleError(f"{len(predictions)} captions for {len(references)} images")
    if not predictions or not all(references):
        raise BadSampleError("there is nothing to score, or an image has no reference caption")
    words = iter(tokenize([*predictions, *(text for texts in references for text in texts)], tokenizer))
    answers = {index: [next(words)] for index in range(len(predictions))}
    return Captions({index: [next(words) for _ in texts] for index, texts in enumerate(references)}, answers)


def cider(captions: Captions) -> tuple[float, list[float]]:
    """CIDEr-D; the weights of words come from the references of the whole set.

    Returns:
        the score (1.0 is written as 100 in papers) and that of each image.
    """
    module = _import("pycocoevalcap.cider.cider")
    score, each = module.Cider().compute_score(captions.references, captions.predictions)
    return float(score), [float(value) for value in each]


def bleu4(captions: Captions) -> float:
    """BLEU-4 over the whole set, in [0, 1]."""
    module = _import("pycocoevalcap.bleu.bleu")
    scores, _ = module.Bleu(4).compute_score(captions.references, captions.predictions, verbose=0)
    return float(scores[3])


def tokenize(captions: Sequence[str], tokenizer: str = "ptb") -> list[str]:
    """Captions as words between single blanks, lower case, without punctuation.

    Raises:
        FlagError: unknown tokenizer, or what it needs is missing.
    """
    lines = [" ".join(caption.split()) for caption in captions]
    if tokenizer == "plain":
        return [" ".join(WORD.findall(line.lower())) for line in lines]
    if tokenizer != "ptb":
        raise FlagError(f"--tokenizer {tokenizer}: must be one of {', '.join(TOKENIZERS)}")
    module = _import("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        raise FlagError(
            "COCO's tokenizer is a Java program and there is no `java` on PATH; install a Java runtime, or score with "
            "`llava.eval.eval_captions --tokenizer plain`, which gives other numbers than those published"
        )
    jar = Path(module.__file__).with_name(JAR)
    command = ["java", "-cp", str(jar), PTB_CLASS, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, encoding="utf-8", check=False)
    words = [line.split() for line in done.stdout.split("\n")[: len(lines)]]
    if done.returncode or len(words) != len(lines):
        raise FlagError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return [" ".join(word for word in row if word not in module.PUNCTUATIONS) for row in words]


def _import(name: str) -> Any:
    """A module of pycocoevalcap.

    Raises:
        FlagError: it is not installed.
    """
    try:
        return __import__(name, fromlist=["_"])
    except ModuleNotFoundError as error:
        raise FlagError(
            f"scores of captions need pycocoevalcap (pip install 'llava-extensions[eval]'): {error}"
        ) from error
