"""METEOR of a generated answer against its reference, by NLTK (upstream `dynamic_eval/model_lvis_for_meteor.py`).

NLTK's METEOR counts synonyms from WordNet, which is data that NLTK downloads on request; without it there is no score.
"""

from __future__ import annotations

from typing import Any

from llava.errors import FlagError


def find_wordnet() -> Any:
    """NLTK's WordNet reader.

    Raises:
        FlagError: NLTK or its WordNet data is not installed; says how to install it.
    """
    try:
        import nltk
        from nltk.corpus import wordnet
    except ImportError as error:
        raise FlagError("METEOR needs NLTK; install it with: pip install 'llava-extensions[eval]'") from error
    try:
        nltk.data.find("corpora/wordnet")
    except LookupError:
        try:
            nltk.data.find("corpora/wordnet.zip")
        except LookupError as error:
            raise FlagError(
                "METEOR needs NLTK's WordNet data, which is not on this machine; fetch it once with: "
                "python -m nltk.downloader wordnet (or set NLTK_DATA to a folder that has corpora/wordnet)"
            ) from error
    return wordnet


def meteor(reference: str, answer: str, wordnet: Any) -> float:
    """METEOR in [0, 1]; words are compared in lower case.

    Args:
        reference: the text to compare with.
        answer: the generated text.
        wordnet: from `find_wordnet`.
    """
    from nltk.tokenize import word_tokenize
    from nltk.translate.meteor_score import meteor_score

    # preserve_line: the split into sentences before the split into words needs another data package and only moves
    # the full stops within a text.
    words = [word_tokenize(text.lower(), preserve_line=True) for text in (reference, answer)]
    return float(meteor_score([words[0]], words[1], wordnet=wordnet))
