"""METEOR through NLTK: words match as they are, by their stem, or as synonyms in WordNet (Lavie & Agarwal, WMT 2007).

NLTK's METEOR is not METEOR 1.5, the Java program whose numbers papers print: 0.684 against 0.425 on one sentence.
Compare it with itself only.

WordNet's data is not part of NLTK. Without it there is no METEOR: `mean_meteor` returns None and
`meteor_unavailable_reason` says why and how to get it (`python -m mdnet_dist.metrics.wordnet`).
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mdnet_dist.metrics.bleu import Tokens

# NLTK is imported inside the functions: it pulls in SciPy and scikit-learn where they are installed, which takes
# seconds that programs without METEOR need not wait for.

HOW_TO_GET_WORDNET = "`python -m mdnet_dist.metrics.wordnet` gets it"


class NoWordNet(Exception):
    """NLTK cannot read WordNet; the message says why."""


def use_nltk_data(folder: Path) -> None:
    """Let NLTK look for its data in `folder` first, then where it looks by itself (`NLTK_DATA`, `~/nltk_data`, ...).

    The folder need not exist. NLTK reads it only if it belongs to this user or root and nobody else can write to it.
    """
    import nltk.data

    name = str(folder.resolve())
    if name not in nltk.data.path:
        nltk.data.path.insert(0, name)


def meteor_unavailable_reason() -> str | None:
    """None where METEOR can be computed; else one line that says what is missing and how to get it."""
    try:
        _open_wordnet()
    except NoWordNet as error:
        return f"METEOR is left out: {error}; {HOW_TO_GET_WORDNET}"
    return None


def mean_meteor(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float | None:
    """Mean over the images of METEOR against the best reference, a fraction of 1; None where WordNet is absent.

    Args:
        hypotheses: one text an image.
        references: one or more texts an image.

    Raises:
        ValueError: no image, not the same number of images in both, or an image without a reference.
    """
    try:
        wordnet = _open_wordnet()
    except NoWordNet:
        return None
    from nltk.translate.meteor_score import meteor_score

    scores = [
        meteor_score([list(text) for text in texts], list(hypothesis), stemmer=_stemmer(), wordnet=wordnet)
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    if not scores:
        raise ValueError("METEOR of no image is not defined")
    return math.fsum(scores) / len(scores)  # fsum rounds once: the order of the images does not matter


class _CachedWordNet:
    """The one method of NLTK's WordNet that METEOR calls; reports use few words, many times."""

    def __init__(self, wordnet: Any) -> None:
        self.synsets = lru_cache(maxsize=None)(wordnet.synsets)


class _CachedStemmer:
    """The one method of NLTK's stemmer that METEOR calls."""

    def __init__(self, stemmer: Any) -> None:
        self.stem = lru_cache(maxsize=None)(stemmer.stem)


@lru_cache(maxsize=1)
def _stemmer() -> _CachedStemmer:
    from nltk.stem.porter import PorterStemmer

    return _CachedStemmer(PorterStemmer())


@lru_cache(maxsize=1)
def _open_wordnet() -> _CachedWordNet:
    """WordNet as NLTK reads it. A failure is not cached: the files may appear later.

    Raises:
        NoWordNet: there is none, or NLTK refuses it.
    """
    from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError
    from nltk.corpus.util import LazyCorpusLoader

    class English(WordNetCorpusReader):
        def map_wn(self, version: str = "wordnet") -> None:
            """Numbers by which other languages' synonyms are found: more than half of the seconds of opening it."""

    wordnet = LazyCorpusLoader("wordnet", English, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if wordnet.synsets("dog"):
                return _CachedWordNet(wordnet)
            reason = "NLTK reads WordNet's files, but finds no word in them"
        except LookupError:
            reason = "NLTK finds no WordNet"
        except (OSError, ValueError, AssertionError, WordNetError, zipfile.BadZipFile) as error:
            reason = f"NLTK cannot read its WordNet ({' '.join(str(error).split())})"
    # Why NLTK passed over a folder, such as one that other users can write to, is only in its warnings.
    refusals = [f" ({warning.message})" for warning in caught if issubclass(warning.category, RuntimeWarning)]
    raise NoWordNet(reason + "".join(refusals[:1]))
