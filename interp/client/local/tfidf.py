"""An encoder that needs no model: TF-IDF vectors of words and parts of words, fitted to the texts that are compared.

    x_f = (1 + ln n_f) (1 + ln((1 + N) / (1 + N_f)))        n_f times in the text, in N_f of N texts

Features are words, punctuation marks, and the words' runs of three characters, ends counted: descriptions name parts of
words too ("ing"), and texts are cut within words. Of scripts that set no blanks between words, all runs of up to three
characters (`sae.text.scripts`).
"""

from collections.abc import Sequence
from typing import Any

from sae.text.scripts import SIGN, UNSPACED, folded, parts

RUN = 3
DIGITS = 6


def tfidf(texts: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """Returns one vector a text, of norm 1 or, where a text has no features, 0.

    Only their inner products mean anything: they are turned so that as many numbers suffice as there are texts.
    """
    import numpy as np

    if not any(map(features, texts)):
        return ((0.0,),) * len(texts)
    found = vectorizer().fit_transform(texts).toarray()
    turned = np.linalg.qr(found.T)[1].T
    return tuple(map(tuple, turned.round(DIGITS).tolist()))


def vectorizer() -> Any:
    """Returns what is to be fitted to texts, and then makes sparse rows of norm 1 (scipy's), one a text."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=features, sublinear_tf=True)  # type: ignore[arg-type]


def features(text: str) -> list[str]:
    """Returns the features of a text, each as often as it occurs."""
    found: list[str] = []
    for word in SIGN.findall(folded(text)):
        if UNSPACED.match(word):
            found += parts(word)
            continue
        found.append(word)
        ends = f"^{word}$"
        if word[0].isalnum():
            found += [ends[start : start + RUN] for start in range(len(ends) - RUN + 1)]
    return found
