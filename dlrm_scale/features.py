"""FeatureSchema: the one source of the names, order and tables of a model's inputs.

A table that a sequence reads, and every single-id feature that shares such a table, lives in TorchRec's
`EmbeddingCollection` (one vector an id); every other table lives in the `EmbeddingBagCollection` (one
pooled vector a feature). All readers take features by key in this module's order, never by position:
the column order of a sharded `KeyedTensor` depends on the plan.
"""

from collections import Counter
from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from dlrm_scale.strict import Strict

OutOfRange = Literal["error", "clip", "modulo"]


class Table(Strict):
    """One embedding table."""

    num_embeddings: int = Field(gt=0, description="rows")
    embedding_dim: int = Field(gt=0, multiple_of=4, description="columns; a multiple of 4, as the kernels need")
    data_type: Literal["fp32", "fp16"] = "fp32"
    pooling: Literal["sum", "mean"] = Field("sum", description="of a multi-hot feature's rows")
    out_of_range: OutOfRange = Field(
        "error",
        description="an id outside [0, num_embeddings): error stops; clip takes the nearest row; modulo hashes; both count",
    )


class DenseFeature(Strict):
    """One scalar column."""

    name: str
    transform: Literal["none", "log1p"] = "none"
    missing: float | None = Field(
        None, description="stands for a null (before the transform); None: a null is an error"
    )
    negative: Literal["error", "clip"] = Field(
        "error", description="under log1p: error stops at a negative value, clip takes 0 and counts"
    )

    @model_validator(mode="after")
    def _check(self) -> "DenseFeature":
        if self.transform == "log1p" and self.missing is not None and self.missing < 0:
            raise ValueError(f"missing ({self.missing}) stands in before the transform log1p and may not be negative")
        return self


class CategoricalFeature(Strict):
    """One id (or, multi-hot, a list of ids) a sample. A null is the empty list: no id."""

    name: str
    table: str
    multi_hot: bool = False
    pooling_factor: float = Field(1.0, gt=0, description="expected ids a sample, for the planner")


class SequenceField(Strict):
    """One column of an event list."""

    name: str
    table: str


class Sequence(Strict):
    """k columns over one event axis, oldest event first; in each sample all k lists are equally long."""

    name: str
    max_length: int = Field(gt=0, description="events kept: the most recent ones; cuts are counted")
    fields: tuple[SequenceField, ...] = Field(min_length=1)
    pooling_factor: float | None = Field(
        None, gt=0, description="expected events a sample, for the planner; None: max_length"
    )

    @property
    def expected_length(self) -> float:
        return float(self.max_length) if self.pooling_factor is None else self.pooling_factor


class FeatureSchema(Strict):
    """All inputs of a model. Feature names are the columns' names in the data."""

    tables: dict[str, Table] = Field(min_length=1)
    dense: tuple[DenseFeature, ...] = ()
    categorical: tuple[CategoricalFeature, ...] = ()
    sequences: tuple[Sequence, ...] = ()
    labels: tuple[str, ...] = Field(("label",), min_length=1, description="one a task; values 0 and 1")
    weight: str | None = Field(None, description="column of non-negative sample weights; None: all 1")
    group: str | None = Field(None, description="integer column that groups samples for GAUC (often the user)")

    @model_validator(mode="after")
    def _check(self) -> "FeatureSchema":
        names = [f.name for f in (*self.dense, *self.categorical, *self.sequence_fields)]
        names += [*self.labels, *([self.weight] if self.weight else [])]
        twice = sorted(n for n, count in Counter(names).items() if count > 1)
        if twice:
            raise ValueError(f"each feature needs a name of its own, but these stand twice: {', '.join(twice)}")
        dotted = [name for name in self.tables if not name or "." in name]
        if dotted:
            raise ValueError(
                f"a table's name is part of its parameter's name and may not be empty or hold a dot: {dotted}"
            )
        read = (*self.categorical, *self.sequence_fields)
        for f in read:
            if f.table not in self.tables:
                raise ValueError(
                    f"feature {f.name} reads table {f.table}, which is not in features.tables: {', '.join(self.tables)}"
                )
        for f in self.categorical:
            if f.multi_hot and f.table in self.sequence_tables:
                raise ValueError(
                    f"multi-hot feature {f.name} shares table {f.table} with a sequence, but a pooled feature's table lives in "
                    f"another collection than a sequence's; give {f.name} a table of its own"
                )
            if not f.multi_hot and f.pooling_factor > 1:
                raise ValueError(
                    f"feature {f.name} has one id a sample, so pooling_factor {f.pooling_factor} > 1 cannot hold; set multi_hot: true"
                )
        means = [name for name in self.tables if name in self.sequence_tables and self.tables[name].pooling == "mean"]
        if means:
            raise ValueError(
                f"table {', '.join(means)} has pooling: mean, but a sequence's table is not pooled; leave it out"
            )
        dims = {name: table.embedding_dim for name, table in self.tables.items() if name in self.sequence_tables}
        if len(set(dims.values())) > 1:
            raise ValueError(
                "all tables that sequences read must have one embedding_dim, as an EmbeddingCollection needs, but they have "
                + ", ".join(f"{name}: {dim}" for name, dim in dims.items())
            )
        unread = sorted(set(self.tables) - {f.table for f in read})
        if unread:
            raise ValueError(
                f"no feature reads table {', '.join(unread)}; remove it from features.tables or add a feature"
            )
        return self

    @cached_property
    def sequence_fields(self) -> tuple[SequenceField, ...]:
        return tuple(f for s in self.sequences for f in s.fields)

    @cached_property
    def sequence_tables(self) -> frozenset[str]:
        """Tables of the `EmbeddingCollection`."""
        return frozenset(f.table for f in self.sequence_fields)

    @cached_property
    def bag_features(self) -> tuple[CategoricalFeature, ...]:
        """Features of the `EmbeddingBagCollection`, in the key order of `RecBatch.bags`."""
        return tuple(f for f in self.categorical if f.table not in self.sequence_tables)

    @cached_property
    def sequence_id_features(self) -> tuple[CategoricalFeature, ...]:
        """Single-id features that share a table with a sequence (a target item beside its history)."""
        return tuple(f for f in self.categorical if f.table in self.sequence_tables)

    @cached_property
    def bag_keys(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.bag_features)

    @cached_property
    def sequence_keys(self) -> tuple[str, ...]:
        """Key order of `RecBatch.sequences`: every sequence field, then the single ids of shared tables."""
        return tuple(f.name for f in (*self.sequence_fields, *self.sequence_id_features))

    @cached_property
    def table_of(self) -> dict[str, str]:
        """Feature name -> table name, for every id feature."""
        return {f.name: f.table for f in (*self.categorical, *self.sequence_fields)}

    @cached_property
    def expected_ids(self) -> dict[str, float]:
        """Feature name -> expected ids a sample (the planner's pooling factor)."""
        expected = {f.name: f.pooling_factor for f in self.categorical}
        expected |= {f.name: s.expected_length for s in self.sequences for f in s.fields}
        return expected

    def features_of(self, table: str) -> tuple[str, ...]:
        """Names of the features that read `table`, in key order."""
        return tuple(name for name in (*self.bag_keys, *self.sequence_keys) if self.table_of[name] == table)
