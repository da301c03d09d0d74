"""The variants and sizes at which `model` times a dense arch."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import apply_override, parse_config, read_tree
from dlrm_scale.errors import ConfigError
from tools.benchmark.growth import AXES as GROWTH
from tools.benchmark.growth import Tree, parse_axes
from tools.benchmark.train import refuse_equal_names

BASE = "base"


def _dim(tree: Tree, size: int) -> None:
    """Of the tokens and of all tables."""
    tree["model"]["dim"] = size
    for table in tree["features"]["tables"].values():
        table["embedding_dim"] = size


AXES = {"dim": _dim, "sequence": GROWTH["sequence"][0], "batch": GROWTH["batch"][0]}


@dataclass(frozen=True)
class Cell:
    """One variant at one combination of sizes."""

    name: str
    sizes: dict[str, int]
    config: RunConfig

    @property
    def batch_size(self) -> int:
        return self.config.train.global_batch_size // self.config.train.accumulate_steps


def cells_of(args: argparse.Namespace) -> list[list[Cell]]:
    """By combination of sizes, each with the base first. Raises ConfigError."""
    variants = [(BASE, []), *((name, changes) for name, *changes in args.variant)]
    refuse_equal_names([name for name, _ in variants])
    axes = parse_axes(args.axis, AXES)
    if empty := [name for name, sizes in axes if not sizes]:
        raise ConfigError(f"--axis {empty[0]} names no size; give at least one, as --axis {empty[0]} 128")
    combinations = [
        dict(zip((n for n, _ in axes), each, strict=True)) for each in itertools.product(*(s for _, s in axes))
    ]
    return [[_cell(args, name, changes, sizes) for name, changes in variants] for sizes in combinations]


def _cell(args: argparse.Namespace, name: str, changes: Sequence[str], sizes: dict[str, int]) -> Cell:
    tree = read_tree(args.config, RunConfig, "configuration")
    for change in (*args.changes, *changes):
        apply_override(tree, change)
    for axis, size in sizes.items():  # last: what a row is called, it is
        AXES[axis](tree, size)
    return Cell(name, sizes, parse_config(tree, f"{args.config}, {name}"))
