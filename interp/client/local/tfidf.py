"""An encoder that needs no model: TF-IDF vectors of words and parts of words, fitted to the texts that are compared.

    x_f = (1 + ln n_f) (1 + ln((1 + N) / (1 + N_f)))        n_f times in the text, in N_f of N texts

Features are words, punctuation marks, and the words' runs of three characters, ends counted: descriptions name parts of
words too ("ing"), and texts are cut within words. Of scripts that set no blanks between words, all runs of up to three
characters (`sae.text.scripts`).
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from jaxtyping import Float

from sae.text.scripts import SIGN, UNSPACED, folded, parts

if TYPE_CHECKING:
    from numpy import ndarray

RUN = 3
DIGITS = 6
KEPT_TEXTS = 1024  # the windows of a latent are compared with its own and with another's description


def tfidf(texts: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """Returns one vector a text, of norm 1 or, where a text has no features, 0.

    Only their inner products mean anything: they are turned so that as many numbers suffice as there are texts.
    """
    import numpy as np

    if not any(_counted(text)[0] for text in texts):
        return ((0.0,),) * len(texts)
    turned = np.asarray(np.linalg.qr(weights(texts).T, mode="r")).T
    return tuple(map(tuple, turned.round(DIGITS).tolist()))


def weights(texts: Sequence[str]) -> "Float[ndarray, 'texts features']":
    """Returns the rows that `vectorizer` would make, bit for bit: of a few short texts, without what it takes to begin.

    Features stand in their alphabetical order; norms are summed in the order in which the texts first have them.
    """
    import numpy as np

    counted = [_counted(text) for text in texts]
    names, counts = (list(chain.from_iterable(columns)) for columns in zip(*counted, strict=True))
    met = {name: place for place, name in enumerate(dict.fromkeys(names))}
    row = np.repeat(np.arange(len(texts)), [len(own) for own, _ in counted])
    feature = np.fromiter(map(met.__getitem__, names), int, len(names))
    order = np.argsort(row * len(met) + feature)
    feature, n = feature[order], np.array(counts)[order]
    found = np.log(n.astype(float)) + 1.0
    found *= (np.log((len(texts) + 1) / (np.bincount(feature) + 1.0)) + 1.0)[feature]
    found /= np.sqrt(np.bincount(row, found * found))[row]
    column = np.empty(len(met), int)
    column[[met[name] for name in sorted(met)]] = np.arange(len(met))
    x = np.zeros((len(texts), len(met)))
    x[row, column[feature]] = found
    return x


@lru_cache(KEPT_TEXTS)
def _counted(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the features of a text, each once, and how often each occurs."""
    counts = Counter(features(text))
    return tuple(counts), tuple(counts.values())


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
