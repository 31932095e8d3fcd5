"""An encoder that needs no model: TF-IDF vectors of words and parts of words, fitted to the texts that are compared.

    x_f = (1 + ln n_f) (1 + ln((1 + N) / (1 + N_f)))        n_f times in the text, in N_f of N texts

Features are words, punctuation marks, and the words' runs of three characters, ends counted: descriptions name parts of
words too ("ing"), and texts are cut within words. Of scripts that set no blanks between words, all runs of up to three
characters (`sae.text.scripts`).
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from jaxtyping import Float

from sae.text.scripts import UNSPACED, parts, signs

if TYPE_CHECKING:
    from numpy import ndarray

RUN = 3
DIGITS = 6
KEPT_WORDS = 2**14  # of which the features are kept: texts are made of the same words


def tfidf(texts: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """Returns one vector a text, of norm 1 or, where a text has no features, 0.

    Only their inner products mean anything: they are turned so that as many numbers suffice as there are texts.
    """
    import numpy as np

    x = weights(texts)
    if not x.shape[1]:
        return ((0.0,),) * len(texts)
    turned = np.asarray(np.linalg.qr(x.T, mode="r")).T
    return tuple(map(tuple, turned.round(DIGITS).tolist()))


def weights(texts: Sequence[str]) -> "Float[ndarray, 'texts features']":
    """Returns the rows that `vectorizer` would make, bit for bit: of a few short texts, without what it takes to begin.

    Features stand in their alphabetical order; norms are summed in the order in which the texts first have them.
    """
    import numpy as np

    words = list(map(signs, texts))
    number = {word: place for place, word in enumerate(dict.fromkeys(chain.from_iterable(words)))}
    own = [_features(word) for word in number]
    met = {name: place for place, name in enumerate(dict.fromkeys(chain.from_iterable(own)))}
    ends = np.cumsum([len(names) for names in own], dtype=int)
    places = np.fromiter(map(met.__getitem__, chain.from_iterable(own)), int, ends[-1] if len(ends) else 0)
    word = np.fromiter(map(number.__getitem__, chain.from_iterable(words)), int)
    row, sizes = np.repeat(np.arange(len(texts)), [len(some) for some in words]), np.diff(ends, prepend=0)[word]
    each = np.repeat(ends[word] - np.cumsum(sizes), sizes) + np.arange(sizes.sum())
    there, n = np.unique(np.repeat(row, sizes) * len(met) + places[each], return_counts=True)
    row, feature = np.divmod(there, len(met))
    found = np.log(n.astype(float)) + 1.0
    found *= (np.log((len(texts) + 1) / (np.bincount(feature) + 1.0)) + 1.0)[feature]
    found /= np.sqrt(np.bincount(row, found * found))[row]
    column = np.empty(len(met), int)
    column[[met[name] for name in sorted(met)]] = np.arange(len(met))
    x = np.zeros((len(texts), len(met)))
    x[row, column[feature]] = found
    return x


def vectorizer() -> Any:
    """Returns what is to be fitted to texts, and then makes sparse rows of norm 1 (scipy's), one a text."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=features, sublinear_tf=True)  # type: ignore[arg-type]


def features(text: str) -> list[str]:
    """Returns the features of a text, each as often as it occurs."""
    return list(chain.from_iterable(map(_features, signs(text))))


@lru_cache(KEPT_WORDS)
def _features(word: str) -> Sequence[str]:
    """Returns the features of a word or punctuation mark, each as often as it occurs."""
    if UNSPACED.match(word):
        return parts(word)
    if not word[0].isalnum():
        return (word,)
    ends = f"^{word}$"
    return (word, *(ends[start : start + RUN] for start in range(len(ends) - RUN + 1)))
