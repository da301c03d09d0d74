"""Which columns of a file a schema reads, and whether the file has them with usable types.

Both are known from a file's header alone, so that a wrong file is refused when it is opened.
"""

import difflib
from collections.abc import Callable

import pyarrow as pa

from dlrm_scale.errors import DataError
from dlrm_scale.features import FeatureSchema


def column_names(schema: FeatureSchema) -> list[str]:
    """Each column that the schema reads, once: the group key may be a feature too."""
    return list(dict.fromkeys(name for name, _, _ in _needs(schema)))


def check_columns(schema: FeatureSchema, found: pa.Schema, file: str) -> None:
    """Raises DataError with every column that is absent from `found` or has a type that does not fit."""
    problems = []
    for name, fits, rule in _needs(schema):
        if name not in found.names:
            nearest = difflib.get_close_matches(name, found.names, n=1, cutoff=0.0)
            problems.append(
                f"there is no column {name}: {rule}" + (f"; the nearest is {nearest[0]}" if nearest else "")
            )
        elif not fits(found.field(name).type):
            problems.append(f"column {name} is of type {found.field(name).type}, but {rule}")
    if problems:
        lines = [f"{file} does not fit the features section; mend either of them:", *dict.fromkeys(problems)]
        if any("needs" in p and "integers" in p and p.startswith("column") for p in problems):
            lines.append(
                "ids are integers: when preparing the data, number the values 0, 1, 2, ... or hash them to integers and set the "
                "table's out_of_range to modulo"
            )
        raise DataError("\n  ".join(lines))


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _needs(schema: FeatureSchema) -> list[tuple[str, Callable[[pa.DataType], bool], str]]:
    """(column, does a type fit, the rule) for each role that a column plays."""
    needs: list[tuple[str, Callable[[pa.DataType], bool], str]] = []
    for f in schema.dense:
        needs.append((f.name, _is_number, f"dense feature {f.name} needs numbers"))
    for c in schema.categorical:
        if c.multi_hot:
            needs.append((c.name, _is_integer_list, f"multi-hot feature {c.name} needs lists of integers"))
        else:
            needs.append((c.name, _is_integer_or_list, f"categorical feature {c.name} needs integers"))
    for s in schema.sequences:
        for field in s.fields:
            needs.append((field.name, _is_integer_list, f"sequence {s.name} needs lists of integers"))
    for label in schema.labels:
        needs.append((label, _is_number_or_bool, f"label {label} needs 0 and 1"))
    if schema.weight:
        needs.append((schema.weight, _is_number, f"sample weight {schema.weight} needs numbers"))
    if schema.group:
        needs.append((schema.group, pa.types.is_integer, f"group key {schema.group} needs integers"))
    return needs


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind)


def _is_number_or_bool(kind: pa.DataType) -> bool:
    return _is_number(kind) or pa.types.is_boolean(kind)


def _is_integer_list(kind: pa.DataType) -> bool:
    return is_list(kind) and pa.types.is_integer(kind.value_type)


def _is_integer_or_list(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or _is_integer_list(kind)
