"""Tables described by a file, without a model: a CSV with a header line, or a JSON list of objects with the same keys."""

import csv
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from dlrm_scale.errors import ConfigError
from dlrm_scale.sharding.plan import TableSpec
from dlrm_scale.strict import Strict


class TableLine(Strict):
    """One table. Its features share the pooling factor."""

    name: str = Field(min_length=1)
    num_embeddings: int = Field(gt=0, lt=2**48, description="so that rows x columns stay an int64")
    embedding_dim: int = Field(gt=0, multiple_of=4)
    pooling_factor: float = Field(ge=0, description="expected ids a sample and feature")
    num_features: int = Field(1, gt=0, le=10_000)
    collection: Literal["bags", "sequences"] = "bags"
    data_type: Literal["fp32", "fp16", "bf16"] = "fp32"
    pooling: Literal["sum", "mean"] = "sum"

    @model_validator(mode="after")
    def _check(self) -> "TableLine":
        if "." in self.name:
            raise ValueError("a table's name is part of its parameter's name and may not hold a dot; rename it")
        if self.collection == "sequences" and self.pooling == "mean":
            raise ValueError("pooling is mean, but a sequence's table is not pooled; leave it out")
        return self

    def spec(self) -> TableSpec:
        features = [self.name] if self.num_features == 1 else [f"{self.name}_{i}" for i in range(self.num_features)]
        return TableSpec(
            collection=self.collection,
            num_embeddings=self.num_embeddings,
            embedding_dim=self.embedding_dim,
            data_type=self.data_type,
            pooling=self.pooling,
            expected_ids_by_feature=dict.fromkeys(features, self.pooling_factor),
        )


def read_tables(path: str | Path) -> dict[str, TableSpec]:
    """Raises ConfigError: unreadable, a column missing or unknown, a value that breaks its rule (file, line, table, value)."""
    path = Path(path)
    lines = _read_lines(path)
    if not lines:
        raise ConfigError(f"{path} has no tables; give one a line, with {', '.join(TableLine.model_fields)}")
    specs: dict[str, TableSpec] = {}
    for number, values in lines:
        try:
            table = (
                TableLine.model_validate_strings(values) if path.suffix != ".json" else TableLine.model_validate(values)
            )
        except ValidationError as e:
            raise ConfigError(f"{path}, {number}{_named(values)}: {_said(e)}") from None
        if table.name in specs:
            raise ConfigError(
                f"{path}, {number}: table {table.name} stands there a second time; give each table one line"
            )
        specs[table.name] = table.spec()
    _check_features(path, specs)
    _check_sequences(path, specs)
    return specs


def _check_features(path: Path, specs: dict[str, TableSpec]) -> None:
    table_of: dict[str, str] = {}
    for name, spec in specs.items():
        for feature in spec.expected_ids_by_feature:
            if feature in table_of:
                raise ConfigError(
                    f"{path}: tables {table_of[feature]} and {name} both have a feature {feature} (of several, a table's features are "
                    "called by its name and a number); rename one table"
                )
            table_of[feature] = name


def _check_sequences(path: Path, specs: dict[str, TableSpec]) -> None:
    dims = {name: spec.embedding_dim for name, spec in specs.items() if spec.collection == "sequences"}
    if len(set(dims.values())) > 1:
        said = ", ".join(f"{name}: {dim}" for name, dim in list(dims.items())[:8])
        raise ConfigError(
            f"{path}: tables of sequences must have one embedding_dim, as an EmbeddingCollection needs, but they have {said}"
        )


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before the first column
        if path.suffix == ".json":
            entries = json.loads(text)
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ConfigError(
                    f"{path} must hold a list of objects with the keys {', '.join(TableLine.model_fields)}"
                )
            return [(f"entry {i}", entry) for i, entry in enumerate(entries)]
        reader = csv.DictReader(text.splitlines(), strict=True)
        columns = reader.fieldnames or []
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise ConfigError(f"{path}: column {', '.join(twice)} stands twice in the header; take one out")
        if len(columns) == 1 and (";" in columns[0] or "\t" in columns[0]):
            raise ConfigError(f"{path}: its header is the one column {columns[0]!r}; separate values by commas")
        rows = [(f"line {reader.line_num}", row) for row in reader]
    except OSError as e:
        raise ConfigError(f"cannot read the tables {path}: {e.strerror}") from None
    except (ValueError, csv.Error) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{path} is not readable as {'JSON' if path.suffix == '.json' else 'CSV'}: {e}") from None
    for number, row in rows:
        if None in row or None in row.values():
            raise ConfigError(f"{path}, {number}: has not as many values as the header has columns")
    return [(number, {key: value for key, value in row.items() if value != ""}) for number, row in rows]


def _named(values: dict[str, Any]) -> str:
    return f" (table {values['name']})" if values.get("name") else ""


def _said(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{key}: no such column; known are {', '.join(TableLine.model_fields)}"
    if first["type"] == "missing":
        return f"{key}: is required"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, but is {first['input']!r}"
