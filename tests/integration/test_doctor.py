"""The doctor on the machine that runs the tests: it imports the stack and lets two gloo processes meet."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def doctor(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.doctor", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_the_install_that_runs_the_tests_is_found_fit():
    done = doctor("--json")
    result = json.loads(done.stdout)
    checks = {check["name"]: check for check in result["checks"]}
    for name in ("python", "packages", "fbgemm build", "import torch", "import fbgemm_gpu", "import torchrec", "gloo"):
        assert checks[name]["status"] == "ok", checks[name]
    faults = [name for name, check in checks.items() if check["status"] == "fault"]
    assert done.returncode == int(bool(faults)), faults


def test_an_unknown_option_is_a_usage_error():
    assert doctor("--yaml").returncode == 2


def test_the_doctor_starts_without_any_third_party_package():
    # -I -S: this interpreter without site-packages, as on a broken install
    start = "import sys; sys.path.insert(0, '.'); import tools.doctor.cli; sys.exit(tools.doctor.cli.main(['--help']))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", start], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
