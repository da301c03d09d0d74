"""The house's rules on itself: imports point one way, files stay small, nothing names a machine."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 450

# Part -> what it may import of this repository, besides itself. "foundation" is every module right under dlrm_scale/.
MAY_IMPORT = {
    "foundation": (),
    "data": ("foundation",),
    "models": ("foundation", "data.batch"),  # RecBatch is a contract between halves of the house
    "sharding": ("foundation",),
    "checkpoint": ("foundation",),
    "resilience": ("foundation",),
    "training": ("foundation", "data", "models", "sharding", "checkpoint", "resilience"),
    "tuning": ("foundation", "sharding", "models.dense_trace"),  # it launches training, as a user does
    "tools": ("foundation", "data", "models", "sharding", "checkpoint", "resilience", "training", "tuning"),
    "launchers": ("foundation", "data", "models", "sharding", "checkpoint", "resilience", "training", "tuning"),
}
# Name -> the only places (a part, or a file) that may use it.
ONLY_IN = {
    # the benchmark's plain TorchRec loop is what sharding/apply.py is held against
    "torchrec.distributed.model_parallel": ("sharding/apply.py", "benchmark/stock_loop.py"),
    "torchrec.distributed.DistributedModelParallel": ("sharding/apply.py", "benchmark/stock_loop.py"),
    "torch.distributed": ("data", "sharding", "checkpoint", "resilience", "training", "tools", "launchers"),
    "torchrec.distributed": (
        *("data", "sharding", "checkpoint", "resilience", "training", "tuning", "tools"),
        "models/inputs.py",  # a lookup may still be under way: it asks for the Awaitable's type, nothing else
    ),
}
PERSONAL_PATH = re.compile(r"(?<![\w.-])/(?:home|work|root|Users|mnt)/\S*")
TEXT_FILES = ("*.py", "*.sh", "*.sbatch", "*.md", "*.yaml", "*.toml", "*.txt", "Makefile", "run")


def part_of(module: str) -> str:
    """`dlrm_scale.data.batch` -> data, `dlrm_scale.config` -> foundation, `tools.tune` -> tools."""
    top, *rest = module.split(".")
    if top != "dlrm_scale":
        return top
    return rest[0] if rest and rest[0] in MAY_IMPORT else "foundation"


def names_used(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, and of every attribute such as `torch.distributed.barrier`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(filter(None, (package, node.module)))
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def within(name: str, scope: str) -> bool:
    return name == scope or name.startswith(f"{scope}.")


def offences(root: Path) -> list[str]:
    found = []
    files = [file for top in ("dlrm_scale", "tools", "launchers") for file in sorted((root / top).rglob("*.py"))]
    for file in files:
        path = file.relative_to(root)
        module = ".".join(path.with_suffix("").parts)
        part = part_of(module)
        for line, name in names_used(ast.parse(file.read_text()), module):
            if rule := broken_rule(part, str(path.relative_to(path.parts[0])), name):
                found.append(f"{path}:{line}: {name}: {rule}")
    return found


def broken_rule(part: str, file: str, name: str) -> str | None:
    if within(name, "dlrm_scale") or name.split(".")[0] in ("tools", "launchers"):
        allowed = (part, *MAY_IMPORT[part])
        inner = name.removeprefix("dlrm_scale.")
        if part_of(name) not in allowed and not any(within(inner, scope) for scope in allowed):
            return f"{part} may import only {', '.join(allowed)}"
    for scope, places in ONLY_IN.items():
        if within(name, scope) and part not in places and file not in places:
            return f"only {', '.join(places)} may use {scope}"
    return None


def test_every_folder_has_a_row_in_the_table():
    folders = {file.parent.relative_to(ROOT / "dlrm_scale").parts[0] for file in (ROOT / "dlrm_scale").glob("*/*.py")}
    assert folders <= set(MAY_IMPORT), f"add a row to MAY_IMPORT for {folders - set(MAY_IMPORT)}"


def test_imports_point_one_way():
    assert offences(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dlrm_scale/config.py", "from dlrm_scale.data.batch import RecBatch"),
        ("dlrm_scale/data/loader.py", "import dlrm_scale.models.dlrm"),
        ("dlrm_scale/data/loader.py", "from dlrm_scale import models"),
        ("dlrm_scale/data/loader.py", "from ..models import dlrm"),
        ("dlrm_scale/data/loader.py", "def late():\n    import dlrm_scale.training"),
        ("dlrm_scale/models/dlrm.py", "from dlrm_scale.data.loader import Loader"),
        ("dlrm_scale/models/dlrm.py", "from torch import distributed"),
        ("dlrm_scale/models/dlrm.py", "import torch\ntorch.distributed.get_rank()"),
        ("dlrm_scale/tuning/launcher.py", "from dlrm_scale.training.main import main"),
        ("dlrm_scale/training/main.py", "import tools.doctor"),
        ("dlrm_scale/training/trainer.py", "from torchrec.distributed import DistributedModelParallel"),
        ("dlrm_scale/sharding/plan.py", "from torchrec.distributed.model_parallel import DistributedModelParallel"),
        ("tools/tune.py", "import launchers.elastic"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = offences(tmp_path)
    last_line = len(source.splitlines())
    assert found and all(offence.startswith(f"{file}:{last_line}: ") for offence in found)


def repository_files() -> list[Path]:
    folders = ("dlrm_scale", "tools", "launchers", "tests", "configs", "docs", "requirements", ".ci")
    files = [file for folder in folders for pattern in TEXT_FILES for file in (ROOT / folder).rglob(pattern)]
    return files + [file for pattern in TEXT_FILES for file in ROOT.glob(pattern)]


def test_files_are_small_enough_to_read():
    lines = {file: file.read_text().count("\n") for file in repository_files() if file.suffix == ".py"}
    assert {str(file.relative_to(ROOT)): n for file, n in lines.items() if n > MAX_LINES} == {}


def test_no_file_names_a_path_of_one_machine():
    found = {str(file.relative_to(ROOT)): PERSONAL_PATH.findall(file.read_text()) for file in repository_files()}
    assert {file: paths for file, paths in found.items() if paths} == {}


def test_every_test_lies_in_a_lane():
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    lanes = {marker.split(":")[0] for marker in markers}
    astray = [
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if file.relative_to(ROOT / "tests").parts[0] not in lanes
    ]
    assert astray == []
