"""The overrides file: what tools.tune found for one configuration, as `--overrides FILE` takes it.

`python -m dlrm_scale.overrides FILE` prints its number of ranks and threads, for launchers/torchrun.sh.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import apply_override, leaves, parse_config, read_tree, set_value
from dlrm_scale.errors import ConfigError, first_lines
from dlrm_scale.strict import Strict

SHOWN_DIFFERENCES = 12


class LaunchPart(Strict):
    num_ranks: int = Field(gt=0)
    threads_per_rank: int | None = Field(None, gt=0, description="None: as launchers/torchrun.sh divides the cores")


class MadeFor(Strict):
    config: dict[str, Any] = Field(description="the base configuration, resolved")
    space: str = Field(description="fingerprint of the tuning space")


class OverridesFile(Strict):
    made_for: MadeFor
    overrides: dict[str, Any] = Field(description="by dotted key of the configuration")
    launch: LaunchPart


def read_overrides(path: str | Path) -> OverridesFile:
    """Raises ConfigError: it cannot be read, or is no overrides file."""
    try:
        return OverridesFile.model_validate_json(Path(path).read_bytes())
    except OSError as e:
        raise ConfigError(f"cannot read the overrides {path}: {e.strerror}") from None
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path} is no overrides file: {where + ': ' if where else ''}{first['msg']}; name the best.json that tools.tune wrote, "
            "and give single values as section.key=value"
        ) from None


def load_tuned(path: str | Path, overrides_path: str | Path, overrides: list[str]) -> RunConfig:
    """The configuration `path`, with the file's overrides and after them those of the command line.

    Raises:
        ConfigError: as `load_config`; and a file made for another configuration than `path` holds, with the differences.
    """
    file = read_overrides(overrides_path)
    tree = read_tree(path, RunConfig, "configuration")
    try:
        base = parse_config(file.made_for.config, str(overrides_path))  # with defaults for keys that are newer than it
    except ConfigError as e:
        raise ConfigError(
            f"the configuration that {overrides_path} was made for is none of this version: {e}\ntune anew"
        ) from None
    now, then = (leaves(c.model_dump(mode="json")) for c in (parse_config(tree, str(path)), base))
    keys = [key for key in sorted(set(now) | set(then)) if now.get(key) != then.get(key)]
    if keys:
        lines = [f"{key}: {then.get(key, 'not set')} there, {now.get(key, 'not set')} now" for key in keys]
        raise ConfigError(
            f"{overrides_path} was made for another configuration than {path}:{first_lines(lines, SHOWN_DIFFERENCES)}"
            "\ntune anew, or give what should differ on the command line, as section.key=value"
        )
    for key, value in file.overrides.items():
        set_value(tree, key, value)
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, f"{path}, as overridden by {overrides_path},")


def main(argv: list[str]) -> int:
    try:
        launch = read_overrides(argv[0]).launch
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(launch.num_ranks, launch.threads_per_rank or "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
