"""Knobs: what one setting may be. Each is a finite, ordered list of values, so that points hash, compare and survive JSON exactly."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dlrm_scale.config import BagShardingType, RunConfig
from dlrm_scale.errors import ConfigError
from dlrm_scale.strict import Strict

Value = bool | int | float | str
LAUNCH_PREFIX = "launch."
RANKS_KEY, THREADS_KEY = LAUNCH_KEYS = ("launch.num_ranks", "launch.threads_per_rank")
ANY_TYPE = "any"  # the planner chooses
MAX_VALUES = 4096


class Point(Mapping[str, Value]):
    """One choice of every active knob, in the order of the space; a knob that is not active is absent. Never altered."""

    __slots__ = ("_hash", "_values")

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)
        self._hash = hash(tuple(self._values.items()))

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and self._values == other._values

    def __repr__(self) -> str:
        return "Point(" + ", ".join(f"{name}={value}" for name, value in self._values.items()) + ")"


class _Knob(Strict):
    when: dict[str, tuple[Value, ...]] = Field(
        {}, description="active only where each of these knobs (named earlier) has one of these values"
    )


class Categorical(_Knob):
    kind: Literal["categorical"] = "categorical"
    key: str = Field(description="of the configuration, or launch.num_ranks or launch.threads_per_rank")
    values: tuple[Value, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "Categorical":
        twice = [v for i, v in enumerate(self.values) if v in self.values[:i]]
        if twice:
            raise ValueError(f"values has {twice[0]} twice; each value is drawn once: take one out")
        return self

    @property
    def choices(self) -> tuple[Value, ...]:
        return self.values


class Integer(_Knob):
    """low, low + multiple, ... up to high; with `log` each value is twice the one before."""

    kind: Literal["integer"] = "integer"
    key: str
    low: int
    high: int
    log: bool = False
    multiple: int = Field(1, gt=0, description="every value is a multiple of it")
    scales: dict[str, float] = Field(
        {},
        description="other keys, multiplied by (value / the base configuration's) ** exponent: {train.dense.lr: 0.5}",
    )

    @model_validator(mode="after")
    def _check(self) -> "Integer":
        if self.low > self.high or self.low % self.multiple or (self.log and self.low < 1):
            raise ValueError(
                f"needs low <= high and low a multiple of `multiple` (and above 0 under log), but low is {self.low}, high {self.high}, "
                f"multiple {self.multiple}; change low"
            )
        if not self.log and (self.high - self.low) // self.multiple >= MAX_VALUES:
            raise ValueError(f"has more than {MAX_VALUES} values; set log or a larger multiple")
        return self

    @property
    def choices(self) -> tuple[Value, ...]:
        if self.log:
            return tuple(self.low << k for k in range((self.high // self.low).bit_length()))
        return tuple(range(self.low, self.high + 1, self.multiple))


class LogFloat(_Knob):
    """`steps` values from low to high, evenly apart in their logarithm, of 4 digits."""

    kind: Literal["log_float"] = "log_float"
    key: str
    low: float = Field(gt=0)
    high: float = Field(gt=0)
    steps: int = Field(9, gt=1, le=MAX_VALUES)

    @model_validator(mode="after")
    def _check(self) -> "LogFloat":
        if len(set(self.choices)) < self.steps or self.low >= self.high:
            raise ValueError(
                f"low ({self.low}) to high ({self.high}) has no {self.steps} values that differ in 4 digits"
            )
        return self

    @property
    def choices(self) -> tuple[Value, ...]:
        ends = math.log(self.low), math.log(self.high)
        logs = [ends[0] + (ends[1] - ends[0]) * i / (self.steps - 1) for i in range(self.steps)]
        return tuple(float(f"{math.exp(x):.4g}") for x in logs)


class Sharding(_Knob):
    """Sets `sharding.tables.<name>.types` of several tables at once: those named, or those of a size class."""

    kind: Literal["sharding"] = "sharding"
    tables: tuple[str, ...] | None = Field(None, min_length=1)
    rows: tuple[int, int] | None = Field(
        None, description="instead of names: tables of at least so many rows, and fewer than that"
    )
    values: tuple[str, ...] = Field(
        min_length=1,
        description=f"types joined by +, as in row_wise+column_wise; {ANY_TYPE} leaves them to the planner",
    )

    @model_validator(mode="after")
    def _check(self) -> "Sharding":
        if (self.tables is None) == (self.rows is None):
            raise ValueError("a sharding knob names its tables either by `tables` or by `rows`; give one of them")
        known = BagShardingType.__args__
        for value in self.values:
            wrong = [t for t in value.split("+") if value != ANY_TYPE and t not in known]
            if wrong:
                raise ValueError(f"values has {wrong[0]}; known are {ANY_TYPE}, {', '.join(known)}, joined by +")
        return self

    @property
    def choices(self) -> tuple[Value, ...]:
        return self.values

    def members(self, config: RunConfig) -> tuple[str, ...]:
        """Raises ConfigError: a table that is not there, or a class without tables."""
        sizes = {name: table.num_embeddings for name, table in config.features.tables.items()}
        if self.tables is not None:
            missing = [name for name in self.tables if name not in sizes]
            if missing:
                raise ConfigError(f"tables has {missing[0]}, which is not in features.tables: {', '.join(sizes)}")
            return self.tables
        low, high = self.rows
        found = tuple(name for name, rows in sizes.items() if low <= rows < high)
        if not found:
            raise ConfigError(
                f"rows is [{low}, {high}], but no table has so many; they have {min(sizes.values())} to {max(sizes.values())}"
            )
        return found


Knob = Annotated[Categorical | Integer | LogFloat | Sharding, Field(discriminator="kind")]


def overrides_of(knob: Any, value: Value, members: tuple[str, ...]) -> list[str]:
    """What the trainer's command line takes; none for a launch key. `members`: the tables of a sharding knob."""
    if isinstance(knob, Sharding):
        types = "null" if value == ANY_TYPE else "[" + ", ".join(str(value).split("+")) + "]"
        return [f"sharding.tables.{name}.types={types}" for name in members]
    if knob.key.startswith(LAUNCH_PREFIX):
        return []
    return [f"{knob.key}={str(value).lower() if isinstance(value, bool) else value}"]
