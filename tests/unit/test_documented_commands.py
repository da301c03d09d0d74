"""The commands in README and docs: bash can read them, and every target, module and file that they name is there."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launchers/*.md")])
FENCED = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAKE = re.compile(r"^\s*make\s+([a-z]+)", re.MULTILINE)
MODULE = re.compile(r"python -m ((?:dlrm_scale|launchers|tools)[\w.]*)")
FILE = re.compile(r"(?<![\w./-])(?:configs|launchers|requirements|tests|tools)/[\w./-]*\w")


def wrong_commands(script: str) -> list[str]:
    """What in this bash text does not parse, or names a thing of the repository that is not there."""
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    wrong = [parsed.stderr] if parsed.returncode else []
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong += [f"make {target}" for target in MAKE.findall(script) if target not in targets]
    for module in MODULE.findall(script):
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            wrong.append(f"python -m {module}")
    return wrong + [file for file in FILE.findall(script) if not (ROOT / file).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_commands_are_there(document):
    assert wrong_commands("\n".join(FENCED.findall(document.read_text()))) == []


@pytest.mark.parametrize(
    "script",
    [
        "make quickstrat",
        "python -m tools.doctors --json",
        "launchers/torchrum.sh --nproc 2",
        "launchers/torchrun.sh --config \\\n    configs/no_such.yaml",
        "torchx run -s local_cwd launchers/component.py:train",
        "echo 'unclosed",
    ],
)
def test_a_wrong_command_is_found(script):
    assert len(wrong_commands(script)) == 1


def test_right_commands_pass():
    script = "make doctor\npython -m tools.doctor --json\ntorchx run launchers/torchx_component.py:train --dryrun\n"
    assert wrong_commands(script) == []
