"""The ids of many features laid out so that what is done to their rows costs the same for one feature as for many.

features with at most one id a row   one matrix, a row of it a sample: taking rows copies whole lines of memory
the others                           jagged; those of one sequence share one array of offsets, and the work on it
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dlrm_scale.data.source import Jagged


# R rows  K features with at most one id a row  B rows taken, or of a batch  N ids of one feature over its rows
class PackedIds(Mapping[str, Jagged]):
    """Ids of R rows by feature, as `Rows.ids`.

    Attributes:
        names: all features, in the order of the rows that were packed.
        single_keys: those of the matrix, K of them.
        single_RK: int64, their ids; 0 where a row has none.
        present_RK: bool, whether a row has one; None: each has.
        jagged: the other features.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        single_keys: tuple[str, ...],
        single_RK: np.ndarray,
        present_RK: np.ndarray | None,
        jagged: dict[str, Jagged],
    ) -> None:
        self.names, self.single_keys, self.jagged = names, single_keys, jagged
        self.single_RK, self.present_RK = single_RK, present_RK

    def __getitem__(self, key: str) -> Jagged:
        if key in self.jagged:
            return self.jagged[key]
        if key not in self.single_keys:
            raise KeyError(key)
        column = self.single_keys.index(key)
        ids_R = self.single_RK[:, column]
        if self.present_RK is None:
            return Jagged(ids_R.copy(), np.arange(len(ids_R) + 1))
        present_R = self.present_RK[:, column]
        return Jagged(ids_R[present_R], _offsets(present_R))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index_B: np.ndarray) -> "PackedIds":
        """The rows at `index_B`, in that order."""
        present_BK = None if self.present_RK is None else self.present_RK.take(index_B, axis=0)
        places: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        jagged = {}
        for key, ids in self.jagged.items():
            if id(ids.offsets) not in places:
                places[id(ids.offsets)] = _places(ids.offsets, index_B)
            where_N, offsets = places[id(ids.offsets)]
            jagged[key] = Jagged(ids.values.take(where_N), offsets)
        single_BK = self.single_RK.take(index_B, axis=0)
        return PackedIds(self.names, self.single_keys, single_BK, present_BK, jagged)

    def keyed(self, keys: Sequence[str], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and lengths as a KeyedJaggedTensor of `keys` has them, with rows without ids behind the R up to `batch_size`.

        Returns:
            int64 (number of ids,), and int32 (len(keys), batch_size).
        """
        single_KR = np.ascontiguousarray(self.single_RK.T)
        present_KR = None if self.present_RK is None else np.ascontiguousarray(self.present_RK.T)
        num_rows = single_KR.shape[1]
        lengths_KB = np.zeros((len(keys), batch_size), np.int32)
        values, at = [], 0
        for run in _runs(keys, self.single_keys):
            if isinstance(run, str):
                ids = self.jagged[run]
                values.append(ids.values[ids.offsets[0] : ids.offsets[-1]])
                lengths_KB[at, :num_rows] = ids.lengths
                at += 1
                continue
            ids_KR = single_KR[run]
            lengths_KR = lengths_KB[at : at + len(ids_KR), :num_rows]
            if present_KR is None:
                values.append(ids_KR.ravel())
                lengths_KR[:] = 1
            else:
                values.append(ids_KR[present_KR[run]])
                lengths_KR[:] = present_KR[run]
            at += len(ids_KR)
        return values[0] if len(values) == 1 else np.concatenate(values), lengths_KB


def _runs(keys: Sequence[str], single_keys: tuple[str, ...]) -> Iterator[slice | str]:
    """`keys` as slices of `single_keys`, as long as they can be; a key that is not among them stands alone."""
    columns = {key: column for column, key in enumerate(single_keys)}
    run = slice(0, 0)
    for key in keys:
        column = columns.get(key)
        if column is not None and column == run.stop and run.start < run.stop:
            run = slice(run.start, column + 1)
            continue
        if run.start < run.stop:
            yield run
        run = slice(0, 0) if column is None else slice(column, column + 1)
        if column is None:
            yield key
    if run.start < run.stop:
        yield run


def pack(parts: Sequence[Mapping[str, Jagged]], num_rows: Sequence[int]) -> PackedIds:
    """The rows of all parts, one part behind the other.

    Args:
        num_rows: of each part.
    """
    packed = [part for part in parts if isinstance(part, PackedIds)]
    single_keys = packed[0].single_keys if packed else ()
    if len(packed) == len(parts) and all(part.single_keys == single_keys for part in packed):
        single_RK = np.concatenate([part.single_RK for part in packed])
        present_RK = None
        if any(part.present_RK is not None for part in packed):
            full = [
                np.ones_like(part.single_RK, bool) if part.present_RK is None else part.present_RK for part in packed
            ]
            present_RK = np.concatenate(full)
    else:
        single_keys = tuple(key for key in parts[0] if all(_at_most_one_a_row(part[key]) for part in parts))
        single_RK, present_RK = _matrix([[part[key] for key in single_keys] for part in parts], num_rows)
    joined: dict[tuple[int, ...], np.ndarray] = {}
    jagged = {}
    for key in parts[0]:
        if key not in single_keys:
            jagged[key] = _join([part[key] for part in parts], joined)
    return PackedIds(tuple(parts[0]), single_keys, single_RK, present_RK, jagged)


def _at_most_one_a_row(ids: Jagged) -> bool:
    num_rows, num_ids = len(ids.offsets) - 1, ids.offsets[-1] - ids.offsets[0]
    return num_ids <= num_rows and (num_rows == 0 or bool(ids.lengths.max() <= 1))


def _matrix(parts: Sequence[Sequence[Jagged]], num_rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids (R, K) of K features in parts, and where there are any (None: everywhere)."""
    ends = np.cumsum(num_rows)
    single_RK = np.zeros((ends[-1], len(parts[0])), np.int64)
    present_RK = None
    for part, end, rows in zip(parts, ends, num_rows, strict=True):
        for column, ids in enumerate(part):
            values = ids.values[ids.offsets[0] : ids.offsets[-1]]
            if len(values) == rows:
                single_RK[end - rows : end, column] = values
                continue
            if present_RK is None:
                present_RK = np.ones(single_RK.shape, bool)
            present_R = ids.lengths.astype(bool)
            single_RK[end - rows : end, column][present_R] = values
            present_RK[end - rows : end, column] = present_R
    return single_RK, present_RK


def _join(parts: Sequence[Jagged], joined: dict[tuple[int, ...], np.ndarray]) -> Jagged:
    """One part behind the other. Parts that share their offsets go on to share them, by way of `joined`."""
    if len(parts) == 1:
        return parts[0]
    shared = tuple(id(part.offsets) for part in parts)
    if shared not in joined:
        joined[shared] = _offsets(np.concatenate([part.lengths for part in parts]))
    return Jagged(np.concatenate([p.values[p.offsets[0] : p.offsets[-1]] for p in parts]), joined[shared])


def _places(offsets: np.ndarray, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the ids of the rows at `index_B` lie, one row behind the other, and the offsets that they have then."""
    starts_B = offsets.take(index_B)
    lengths_B = offsets.take(index_B + 1) - starts_B
    taken = _offsets(lengths_B)
    where_N = np.arange(taken[-1])
    where_N += np.repeat(starts_B - taken[:-1], lengths_B)
    return where_N, taken


def _offsets(lengths_R: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths_R) + 1, np.int64)
    np.cumsum(lengths_R, out=offsets[1:])
    return offsets
