"""A small tuning space in a folder of its own, as files."""

from pathlib import Path
from typing import Any

import yaml

from tests.support.configs import TINY

QUICK: dict[str, Any] = {**TINY, "model": {"arch": "logistic"}}  # a model whose trace takes no seconds


def write_space(folder: Path, knobs: dict[str, Any], tree: dict[str, Any] = QUICK) -> Path:
    """config.yaml and space.yaml; the path of the latter."""
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"base": str(folder / "config.yaml"), "cluster": "2xcpu", "knobs": knobs}))
    return path
