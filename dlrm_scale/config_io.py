"""Reads a `RunConfig` (from YAML and dotted overrides) or another strict model, and says in one screen what is wrong with it.

config = load_config("configs/quickstart.yaml", ["train.global_batch_size=4096"])
"""

import difflib
import hashlib
import json
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dlrm_scale.config import RunConfig
from dlrm_scale.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads `path`, applies `a.b.c=value` overrides (values are YAML) and validates.

    Raises:
        ConfigError: every problem found, each with its dotted key, and the nearest known key for an unknown one.
    """
    tree = read_tree(path, RunConfig, "configuration")
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, origin=f"{path}, as overridden," if overrides else str(path))


def parse_overrides(model: type[Model], overrides: list[str]) -> Model:
    """A model from `a.b.c=value` overrides of its defaults alone. Raises ConfigError, as `load_config` does."""
    tree: dict[str, Any] = {}
    for override in overrides:
        apply_override(tree, override)
    return parse_tree(tree, model, "list of section.key=value", "the command line")


def read_tree(path: str | Path, model: type[BaseModel], kind: str) -> dict[str, Any]:
    """The mapping that a YAML file of `model` holds, not yet validated; `kind` is what messages call such a file.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or holds no mapping.
    """
    try:
        tree = _read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read the {kind} {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not valid YAML: {e}") from None
    if not isinstance(tree, dict):
        keys = ", ".join(list(model.model_fields)[:5])
        raise ConfigError(f"{path} must hold a mapping of keys ({keys}, ...), but holds {type(tree).__name__}")
    return tree


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2, and a key that stands twice is an error, not the last one's win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in seen:
                raise yaml.YAMLError(f"key {key} stands twice, in lines {seen[key]} and {line}")
            seen[key] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def parse_config(tree: dict[str, Any], origin: str) -> RunConfig:
    """Validates a plain tree of mappings, lists and scalars. Raises ConfigError, as `load_config` does."""
    return parse_tree(tree, RunConfig, "configuration", origin)


def parse_tree(tree: dict[str, Any], model: type[Model], kind: str, origin: str) -> Model:
    """`tree` as a `model`. Raises ConfigError: every problem found, each with its dotted key."""
    try:
        # JSON mode: a list is a tuple, an int is a float, nothing else is cast
        return model.model_validate_json(json.dumps(tree))
    except TypeError as e:
        raise ConfigError(f"{origin}: {e}") from None
    except ValidationError as e:
        lines = [f"  {_describe(error, model)}" for error in e.errors(include_url=False)]
        raise ConfigError(f"{origin} is not a valid {kind}:\n" + "\n".join(lines)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def fingerprint(model: BaseModel) -> str:
    """12 hex digits that change when any field does, however it was written down."""
    text = json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Writes `a.b.c=value` into a plain tree, sections that are missing on the way too. Raises ConfigError: it is no override."""
    set_value(tree, *parse_override(override))


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `a.b.c=value`. Raises ConfigError: it is no override."""
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"an override reads section.key=value, but this is {override!r}; see --help")
    try:
        return key, _read_yaml(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"the value of override {override!r} is not valid YAML: {e}") from None


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Raises ConfigError: a part of the dotted key is a value, not a section."""
    *parents, leaf = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"override {key}={value}: {'.'.join(parents[: depth + 1])} is a value, not a section; give it whole"
            )
    node[leaf] = value


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; the entries of a list by their number."""
    if isinstance(tree, dict) and tree:
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{prefix}{key}.").items()}
    if isinstance(tree, list) and tree:
        return {k: v for i, value in enumerate(tree) for k, v in leaves(value, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): tree}


def _describe(error: Any, root: type[BaseModel]) -> str:
    """One line for one of pydantic's errors: where, what is the rule, what was given, what was meant."""
    path = [str(part) for part in error["loc"]]
    models, path = _walk(path, root, unknown_key=error["type"] == "extra_forbidden")
    where = ".".join(path) or "the whole"
    if error["type"] == "extra_forbidden":
        known = sorted({name for model in models for name in model.model_fields})
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
        return f"{where}: no such key; the nearest is {near[0]}" + (
            f" (known: {', '.join(known)})" if len(known) <= 16 else ""
        )
    if error["type"] == "missing":
        return f"{where}: is required"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message if not path else f"{where}: {message}"
    given = error["input"]
    shown = f", but is {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return f"{where}: {message[0].lower()}{message[1:]}{shown}"


def _walk(loc: list[str], root: type[BaseModel], unknown_key: bool) -> tuple[list[type[BaseModel]], list[str]]:
    """The models that the last part of `loc` is looked up in, and `loc` without the tags that pydantic adds for unions."""
    models = [root]
    path: list[str] = []
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        found = [model.model_fields[part] for model in models if part in model.model_fields]
        if found:
            path.append(part)
            if not last:
                models = [m for field in found for m in _models_in(field.annotation)]
            continue
        tagged = [m for m in models if any(f.default == part for f in m.model_fields.values())]
        if tagged and not (last and unknown_key):
            models = tagged
            continue
        path.append(part)  # an index, a mapping's key, or the unknown key itself
    return models, path


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every model named in a type annotation such as `Annotated[A | B, ...]`, `tuple[A, ...]` or `dict[str, A]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType, tuple, dict, list):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []
