"""Turns the raw columns of one block of a file into validated `Rows`.

Every file source reads through this one place, so that a bad value is found, named and mended in one way.
Whole columns are handled at once; a list column's values are Arrow's own buffer where its type allows it.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_scale.data.columns import is_list
from dlrm_scale.data.hashing import modulo
from dlrm_scale.data.source import Jagged, Rows
from dlrm_scale.errors import DataError
from dlrm_scale.features import DenseFeature, FeatureSchema, Sequence

FLOAT32_MAX = float(np.finfo(np.float32).max)


# R rows  F dense features  T tasks  N ids of one feature over the R rows
class Decoder:
    """Decodes the blocks of one source; not to be shared between threads.

    Attributes:
        mended: how often each policy changed a value so far; a block that is read twice counts twice.
    """

    def __init__(self, schema: FeatureSchema):
        self.schema = schema
        self.mended: Counter[str] = Counter()

    def decode(self, columns: Mapping[str, pa.Array], file: str, first_row: int) -> Rows:
        """Decodes R rows.

        Args:
            columns: every column of `column_names(schema)`, R values each, of types that `check_columns` takes.
            file: where they come from, for messages.
            first_row: number within the file, from 0, of the first of them.

        Raises:
            DataError: the first bad value of the first bad column, with file, row, feature, table and rule.
        """
        return _Block(self.schema, columns, file, first_row, self.mended).rows()


class _Block:
    def __init__(
        self,
        schema: FeatureSchema,
        columns: Mapping[str, pa.Array],
        file: str,
        first_row: int,
        mended: Counter[str],
    ):
        self.schema = schema
        self.columns = columns
        self.file = file
        self.first_row = first_row
        self.mended = mended
        self.num_rows = len(columns[schema.labels[0]])
        self.one_each = np.arange(self.num_rows + 1)  # the offsets of every feature that has one id in each row

    def rows(self) -> Rows:
        dense_RF = np.empty((self.num_rows, len(self.schema.dense)), np.float32)
        for column, feature in enumerate(self.schema.dense):
            dense_RF[:, column] = self._dense(feature)
        ids = {f.name: self._single_or_bag(f.name, f.multi_hot) for f in self.schema.categorical}
        for sequence in self.schema.sequences:
            ids |= self._sequence(sequence)
        return Rows(
            dense_RF=dense_RF,
            ids=ids,
            labels_RT=np.stack([self._labels(name) for name in self.schema.labels], axis=1),
            weights_R=self._weights(),
            groups_R=self._groups(),
        )

    # ---------------------------------------------------------------- scalars
    def _dense(self, feature: DenseFeature) -> np.ndarray:
        what = f"dense feature {feature.name}"
        column = self.columns[feature.name]
        if column.null_count:
            null_R = column.is_null().to_numpy(zero_copy_only=False)
            if feature.missing is None:
                self._fail_if(null_R, f"{what} is null; fill it, or set its `missing` to what stands for a null")
            values_R = np.where(null_R, feature.missing, column.fill_null(0).to_numpy(zero_copy_only=False))
        else:
            values_R = column.to_numpy(zero_copy_only=False)
        self._check_finite(what, values_R)
        if feature.transform == "none":
            return values_R
        values_R = values_R.astype(np.float64, copy=False)
        negative_R = values_R < 0
        if negative_R.any():
            if feature.negative == "error":
                self._fail_if(
                    negative_R,
                    f"{what} is {{value}}, but transform log1p takes no negative value; mend the data, set its "
                    f"`negative` to clip (taken as 0 and counted), or its transform to none",
                    values_R,
                )
            self.mended[f"negative values of {feature.name} taken as 0"] += int(negative_R.sum())
        return np.log1p(np.maximum(values_R, 0))

    def _labels(self, name: str) -> np.ndarray:
        values_R = self._without_null(name, f"label {name}")
        self._fail_if(
            (values_R != 0) & (values_R != 1),
            f"label {name} is {{value}}, but a label is 0 or 1; turn it into 0 or 1 when preparing the data",
            values_R,
        )
        return values_R.astype(np.float32)

    def _weights(self) -> np.ndarray:
        name = self.schema.weight
        if name is None:
            return np.ones(self.num_rows, np.float32)
        values_R = self._without_null(name, f"sample weight {name}")
        self._check_finite(f"sample weight {name}", values_R)
        self._fail_if(
            values_R < 0,
            f"sample weight {name} is {{value}}, but a weight is not negative; weight 0 leaves a row out",
            values_R,
        )
        return values_R.astype(np.float32)

    def _groups(self) -> np.ndarray:
        name = self.schema.group
        if name is None:
            return np.zeros(self.num_rows, np.int64)
        return self._without_null(name, f"group key {name}").astype(np.int64, copy=False)  # uint64: the same bits

    def _without_null(self, name: str, what: str) -> np.ndarray:
        column = self.columns[name]
        if column.null_count:
            null_R = column.is_null().to_numpy(zero_copy_only=False)
            self._fail_if(null_R, f"{what} is null, but each row needs one; fill it or leave the row out of the file")
        return column.to_numpy(zero_copy_only=False)

    def _check_finite(self, what: str, values_R: np.ndarray) -> None:
        if values_R.dtype.kind != "f" or not values_R.size:
            return  # no integer is beyond float32
        if not (values_R.min() >= -FLOAT32_MAX and values_R.max() <= FLOAT32_MAX):  # of NaN, no comparison is true
            values_R = values_R.astype(np.float64, copy=False)
            finite_R = np.abs(values_R) <= FLOAT32_MAX
            self._fail_if(~finite_R, f"{what} is {{value}}, but must be a finite float32; mend the data", values_R)

    # ---------------------------------------------------------------- ids
    def _single_or_bag(self, name: str, multi_hot: bool) -> Jagged:
        ids = self._raw_ids(name)
        if not multi_hot and ids.offsets is not self.one_each:
            self._fail_if(
                ids.lengths > 1,
                f"categorical feature {name} has {{value}} ids, but takes at most one; set its multi_hot to true",
                ids.lengths,
            )
        return self._in_range(name, ids)

    def _sequence(self, sequence: Sequence) -> dict[str, Jagged]:
        fields = {field.name: self._raw_ids(field.name) for field in sequence.fields}
        (first_name, first), *others = fields.items()
        for name, field in others:
            ragged_R = field.lengths != first.lengths
            if ragged_R.any():
                row = int(np.argmax(ragged_R))
                self._fail(
                    row,
                    f"sequence {sequence.name} is ragged: {first_name} has {first.lengths[row]} events, but {name} has "
                    f"{field.lengths[row]}; the fields of a sequence are equally long in each row, so pad or cut them "
                    f"when preparing the data",
                )
        too_long_R = first.lengths > sequence.max_length
        if too_long_R.any():
            events = f"rows of sequence {sequence.name} cut to the last {sequence.max_length} events"
            self.mended[events] += int(too_long_R.sum())
            fields = _keep_last(fields, sequence.max_length)
        else:
            fields = {name: Jagged(ids.values, first.offsets) for name, ids in fields.items()}  # shared: see PackedIds
        return {name: self._in_range(name, ids) for name, ids in fields.items()}

    def _raw_ids(self, name: str) -> Jagged:
        """Ids as they stand in the file, in the file's integer type; a null row has none."""
        column = self.columns[name]
        if not is_list(column.type):
            if not column.null_count:
                return Jagged(column.to_numpy(), self.one_each)
            present_R = column.is_valid().to_numpy(zero_copy_only=False)
            return Jagged(column.drop_null().to_numpy(), _offsets(present_R))
        lengths_R = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        offsets = _offsets(lengths_R)
        values = column.flatten()  # honours the offset of a slice, and skips what lies under a null row
        if values.null_count:
            null_N = values.is_null().to_numpy(zero_copy_only=False)
            self._fail_at_id(null_N, offsets, f"feature {name} has a null inside its list; leave it out of the list")
        return Jagged(values.to_numpy(), offsets)

    def _in_range(self, name: str, ids: Jagged) -> Jagged:
        """`ids` as int64 in [0, num_embeddings), or mended by the table's policy."""
        table_name = self.schema.table_of[name]
        table = self.schema.tables[table_name]
        rows = table.num_embeddings
        values_N = ids.values
        if values_N.size and (values_N.min() < 0 or values_N.max() >= rows):
            if (
                values_N.dtype.kind == "i"
            ):  # uint64 has ids that int64 has not: unsigned ones stay so until they are in range
                values_N = values_N.astype(np.int64, copy=False)
            outside_N = (values_N < 0) | (values_N >= rows)
            if table.out_of_range == "error":
                self._fail_at_id(
                    outside_N,
                    ids.offsets,
                    f"feature {name} has id {values_N[np.argmax(outside_N)]}, but table {table_name} has the rows "
                    f"[0, {rows}); raise features.tables.{table_name}.num_embeddings, mend the data, or set "
                    f"features.tables.{table_name}.out_of_range to clip or modulo",
                )
            if table.out_of_range == "clip":
                values_N, done = np.clip(values_N, 0, rows - 1), f"clipped to [0, {rows - 1}]"
            else:
                values_N, done = modulo(values_N, rows), f"taken modulo {rows}"
            self.mended[f"ids of {name} {done}"] += int(outside_N.sum())
        return Jagged(values_N.astype(np.int64, copy=False), ids.offsets)

    # ---------------------------------------------------------------- faults
    def _fail_if(self, bad_R: np.ndarray, message: str, values_R: np.ndarray | None = None) -> None:
        """Raises for the first bad row, if there is one; `{value}` in the message is its value."""
        if bad_R.any():
            row = int(np.argmax(bad_R))
            self._fail(row, message if values_R is None else message.replace("{value}", str(values_R[row])))

    def _fail_at_id(self, bad_N: np.ndarray, offsets: np.ndarray, message: str) -> NoReturn:
        self._fail(int(np.searchsorted(offsets, np.argmax(bad_N), side="right")) - 1, message)

    def _fail(self, row: int, message: str) -> NoReturn:
        raise DataError(f"{self.file}, row {self.first_row + row} (counted from 0): {message}")


def _offsets(lengths_R: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths_R, dtype=np.int64)])


def _keep_last(fields: dict[str, Jagged], max_length: int) -> dict[str, Jagged]:
    """The last `max_length` events of each row, of fields that are equally long."""
    first = next(iter(fields.values()))
    num_events = first.offsets[-1]
    to_end_N = np.repeat(first.offsets[1:], first.lengths) - np.arange(num_events)
    kept_N = to_end_N <= max_length
    offsets = _offsets(np.minimum(first.lengths, max_length))
    return {name: Jagged(field.values[kept_N], offsets) for name, field in fields.items()}
