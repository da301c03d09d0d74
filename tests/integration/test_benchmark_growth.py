"""The growth benchmark as a user runs it, on a real rank."""

import json

import pytest
import yaml

from tests.support.configs import TINY
from tools.benchmark.__main__ import main


@pytest.mark.timeout(300)
def test_sizes_are_trained_and_drawn_and_one_that_does_not_fit_is_told(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY))
    html = tmp_path / "growth.html"
    written = ["--html", str(html), "--out", str(tmp_path / "growth.json")]
    axes = ["--axis", "batch", "64", "128", "--axis", "rows", "1000000000000"]
    sizes = [*axes, "--steps", "4", "--repeats", "1", "--nproc", "1"]
    assert main(["growth", "--config", str(tmp_path / "config.yaml"), *sizes, *written, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    small, large, rows = result["cells"]
    assert small["samples_per_s"]["median"] > 0 and large["samples_per_s"]["median"] > 0
    assert "no sharding plan fits" in rows["does_not_fit"] and "GB a rank" in rows["does_not_fit"]
    assert html.read_text().count("<svg") == 1
    assert json.loads((tmp_path / "growth.json").read_text()) == result
