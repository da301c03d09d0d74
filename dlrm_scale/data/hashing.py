"""Random numbers as a pure function of (stream, counter), vectorised: SplitMix64 (Steele, Lea, Flood 2014) as a hash.

A generator with a state would tie a sample's value, or a row's place, to what was drawn before it; and NumPy does not promise
that its generators' permutations stay the same across versions, which a resumed run would notice.
"""

import hashlib

import numpy as np

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def stream(*parts: str | int) -> np.uint64:
    """A key for `hash64` that differs for every sequence of parts."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)  # NumPy's integers have another repr
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def hash64(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """uint64 hashes of integer counters, in the counters' shape."""
    h = counter.astype(np.uint64)  # a copy: the rest is in place
    h *= _INCREMENT
    h += key
    h ^= h >> np.uint64(30)
    h *= _MULTIPLIER_1
    h ^= h >> np.uint64(27)
    h *= _MULTIPLIER_2
    h ^= h >> np.uint64(31)
    return h


def uniform(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """float64 in [0, 1)."""
    return (hash64(key, counter) >> np.uint64(11)) * 2.0**-53


def normal(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """float64 standard normal (Box-Muller on the two halves of one hash)."""
    h = hash64(key, counter)
    radius_uniform = ((h >> np.uint64(32)) + 0.5) * 2.0**-32
    angle = (h & np.uint64(0xFFFFFFFF)) * (2.0**-32 * 2 * np.pi)
    return np.sqrt(-2 * np.log(radius_uniform)) * np.cos(angle)


def permutation(key: np.uint64, n: int) -> np.ndarray:
    """int64 (n,): a random order of 0 .. n - 1."""
    return np.argsort(hash64(key, np.arange(n)))  # hash64 is a bijection: no two are equal, any sort gives this order
