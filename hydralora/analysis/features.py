"""Texts as points: TF-IDF reduced by a singular value decomposition, or embeddings of a local language model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel

from llava.errors import FlagError
from llava.runtime.tokenizer import load_tokenizer

DIMENSIONS = 50
"""Of the reduced TF-IDF features."""

WORDS = 8
"""Typical words that are shown for each cluster."""

MAX_TOKENS = 256


@contextlib.contextmanager
def scikit_learn() -> Iterator[None]:
    """Say which extra is missing when scikit-learn is.

    Raises:
        FlagError: scikit-learn is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise FlagError(
            f"this needs {error.name}; install the extra: pip install 'llava-extensions[analysis]'"
        ) from error


def _vectorizer() -> Any:
    with scikit_learn():
        from sklearn.feature_extraction.text import TfidfVectorizer
    return TfidfVectorizer(sublinear_tf=True, max_features=20_000)


def tf_idf(texts: Sequence[str], seed: int) -> np.ndarray:
    """TF-IDF features of unit length, (texts, at most `DIMENSIONS`).

    Raises:
        FlagError: scikit-learn is not installed, or there are fewer than three texts.
    """
    if len(texts) < 3:
        raise FlagError(f"{len(texts)} texts cannot be clustered; give at least 3")
    matrix = _vectorizer().fit_transform(texts)  # (texts, words)
    with scikit_learn():
        from sklearn.decomposition import TruncatedSVD
    size = min(DIMENSIONS, matrix.shape[1] - 1, matrix.shape[0] - 1)
    if size < 1:
        return np.asarray(matrix.todense())
    return _unit(TruncatedSVD(size, random_state=seed).fit_transform(matrix))


@torch.no_grad()
def embeddings(texts: Sequence[str], model_path: str, batch_size: int = 16) -> np.ndarray:
    """Mean of a model's last hidden states over the tokens of each text, of unit length, (texts, D)."""
    tokenizer = load_tokenizer(model_path, padding_side="right")
    model = AutoModel.from_pretrained(model_path).eval()
    parts = []
    for start in tqdm(range(0, len(texts), batch_size), desc="embeddings"):
        chunk = list(texts[start : start + batch_size])
        batch = tokenizer(chunk, return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS)
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden)  # (B, T, 1)
        parts.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))  # (B, D)
    return _unit(torch.cat(parts).float().numpy())


def _unit(points: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return points / np.maximum(lengths, 1e-12)


def typical_words(texts: Sequence[str], labels: Sequence[int]) -> dict[int, list[str]]:
    """For each cluster the words whose TF-IDF is highest above that of all texts."""
    vectorizer = _vectorizer()
    matrix = vectorizer.fit_transform(texts)
    names = vectorizer.get_feature_names_out()
    overall = np.asarray(matrix.mean(axis=0)).ravel()
    assigned = np.asarray(labels)
    words = {}
    for label in sorted(set(labels)):
        above = np.asarray(matrix[assigned == label].mean(axis=0)).ravel() - overall
        order = np.argsort(-above, kind="stable")[:WORDS]
        words[label] = [str(names[index]) for index in order if above[index] > 0]
    return words
