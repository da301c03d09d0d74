"""The growth benchmark without ranks: what grows, sizes that do not fit, and the plots."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dlrm_scale.errors import ConfigError, NoPlanError
from tools.benchmark import growth
from tools.benchmark.ranks import NoMemoryError
from tools.charts import Axis
from tools.commands import PLAIN

CONSOLE = Console(stderr=True, **PLAIN)


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Results go to runs/ of it."""
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    monkeypatch.chdir(tmp_path)


def arguments(**options: Any) -> argparse.Namespace:
    defaults = {"config": "configs/quickstart.yaml", "changes": [], "axis": None, "nproc": 2, "threads": 1, "steps": 8}
    return argparse.Namespace(**{**defaults, "repeats": 2, "out": None, "html": None, **options})


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Sizes in the order in which they are measured; some do not fit."""
    names = []

    def measure(variant, tell):
        names.append(variant.name)
        if variant.name == "rows 100000000":
            raise NoPlanError(
                "no sharding plan fits: table user puts 13 GB\n  of 12 GB a rank\n  what would make it fit"
            )
        if variant.name == "sequence 1000":
            raise NoMemoryError("rank 0 was ended by SIGKILL")
        return {"samples_per_s": 1000.0 + len(names), "peak_memory": [{"host_bytes": 2e9}]}

    monkeypatch.setattr(growth, "measure_here", measure)
    return names


def test_every_axis_is_plotted_by_one_command_and_sizes_that_do_not_fit_are_told(measured, tmp_path):
    out = tmp_path / "growth.html"
    result = growth.run(arguments(html=str(out)), CONSOLE)
    once = [name for name in measured if measured.count(name) == 1]
    assert once == ["rows 100000000", "sequence 1000"] and len(measured) == 2 * (5 + 4 + 5 + 5) - 2
    told = {(cell["axis"], cell["size"]): cell["does_not_fit"] for cell in result["cells"] if cell["does_not_fit"]}
    assert told["rows", 100_000_000] == "no sharding plan fits: table user puts 13 GB; of 12 GB a rank"
    assert re.fullmatch(
        r"rank 0 was ended by SIGKILL; the machine has [\d.]+ GB of host memory", told["sequence", 1000]
    )
    page = out.read_text()
    assert page.count("<svg") == page.count("samples/s</text>") == 4
    for axis in ("global batch size, samples", "tables, one for", "rows of each table", "events of a sequence at most"):
        assert f"<h2>{axis}" in page and f">{axis}" in page.split("<svg", 1)[1]
    for tick in ("32,768", "512", "10,000,000", "300"):
        assert f"text-anchor='middle'>{tick}</text>" in page
    assert "<p>100,000,000 does not fit: no sharding plan fits" in page


def test_sizes_are_those_asked_for(measured):
    growth.run(arguments(axis=[["batch", "64", "128", "64"], ["rows", "500"]], repeats=1), CONSOLE)
    assert measured == ["batch 64", "batch 128", "rows 500"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": [["batch", "64"], ["batch", "128"]]}, "--axis batch is given twice"),
        ({"axis": [["batch", "²"]]}, "a size is a whole number above 0, but one is '²'"),
        ({"nproc": 3}, "must be a multiple of"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_file_is_written(measured, options, message):
    with pytest.raises(ConfigError, match=message):
        growth.run(arguments(**options), CONSOLE)
    assert measured == [] and not Path("runs").exists()


@pytest.mark.parametrize("option", ["out", "html"])
def test_what_cannot_be_written_is_refused_before_anything_is_measured(measured, tmp_path, option):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"name another place: --{option}"):
        growth.run(arguments(**{option: str(tmp_path / "file" / "growth")}), CONSOLE)
    assert measured == []


def test_a_call_that_is_ended_leaves_the_result_of_what_it_measured(measured, monkeypatch, capsys):
    """The fourth measurement is interrupted: of two sizes two repeats are wanted, of the second one is there."""
    measure = growth.measure_here

    def interrupted(variant, tell):
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(variant, tell)

    monkeypatch.setattr(growth, "measure_here", interrupted)
    with pytest.raises(KeyboardInterrupt):
        growth.run(arguments(axis=[["batch", "64", "128"]], html="growth.html"), CONSOLE)
    [out] = Path("runs").iterdir()
    result = json.loads(out.read_text())
    assert [(cell["size"], cell["repeats"]) for cell in result["cells"]] == [(64, 2), (128, 1)]
    assert result["cells"][0]["samples_per_s"] == {"median": 1002.0, "least": 1001.0, "most": 1003.0}
    page = Path("growth.html").read_text()
    assert "2 repeats" in page and "1 repeat<" in page
    told = capsys.readouterr().err.splitlines()
    assert f"the result so far is always in {out} and growth.html" in told
    assert told[-1] == "3 of 4: batch 64, 2 of 2: 1,003 samples/s"


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(600, 5000, [1000, 2000, 5000]), (3, 9e6, [10.0**power for power in range(1, 7)])]
)
def test_a_logarithmic_axis_has_round_ticks(low, high, ticks):
    assert Axis("x", low, high, log=True).ticks() == ticks
