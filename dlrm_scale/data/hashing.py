"""Random numbers as a pure function of (stream, counter), vectorised: SplitMix64 (Steele, Lea, Flood 2014) as a hash.

A generator with a state would tie a sample's value, or a row's place, to what was drawn before it; and NumPy does not promise
that its generators' permutations stay the same across versions, which a resumed run would notice.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


_CHUNK = 8192  # elements: a chunk and what is made of it on the way stay in the nearest caches


@lru_cache(maxsize=4096)
def stream(*parts: str | int) -> np.uint64:
    """A key for `hash64` that differs for every sequence of parts."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)  # NumPy's integers have another repr
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def by_chunks(function: Callable[..., np.ndarray], *columns: np.ndarray) -> np.ndarray:
    """`function(*columns)`, of a function of each element alone; quicker than at once where the columns are long."""
    num = len(columns[0])
    if num <= _CHUNK:
        return function(*columns)
    return np.concatenate([function(*(c[i : i + _CHUNK] for c in columns)) for i in range(0, num, _CHUNK)])


def hash64(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """uint64 hashes of integer counters, in the counters' shape."""
    h = counter.astype(np.uint64)  # a copy: the rest is in place
    shifted = np.empty_like(h)
    h *= _INCREMENT
    h += key
    h ^= np.right_shift(h, np.uint64(30), out=shifted)
    h *= _MULTIPLIER_1
    h ^= np.right_shift(h, np.uint64(27), out=shifted)
    h *= _MULTIPLIER_2
    h ^= np.right_shift(h, np.uint64(31), out=shifted)
    return h


def uniform(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """float64 in [0, 1)."""
    h = hash64(key, counter)
    h >>= np.uint64(11)
    return h * 2.0**-53


def normal(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """float64 standard normal (Box-Muller on the two halves of one hash)."""
    h = hash64(key, counter)
    radius = (h >> np.uint64(32)) + 0.5
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    h &= np.uint64(0xFFFFFFFF)
    angle = h * (2.0**-32 * 2 * np.pi)
    radius *= np.cos(angle, out=angle)
    return radius


def modulo(values: np.ndarray, by: int) -> np.ndarray:
    """`values % by` of integers: NumPy divides by one number several times as fast as it takes remainders."""
    quotient = values // by
    quotient *= by
    return np.subtract(values, quotient, out=quotient)


def permutation(key: np.uint64, n: int) -> np.ndarray:
    """int64 (n,): a random order of 0 .. n - 1."""
    return np.argsort(hash64(key, np.arange(n)))  # hash64 is a bijection: no two are equal, any sort gives this order
