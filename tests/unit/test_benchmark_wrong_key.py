"""A wrong key of a benchmark's configuration is told before the libraries are loaded, which takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALL = """
import sys
from tools.benchmark.__main__ import main
code = main(sys.argv[1:])
print({"torch", "torchrec", "fbgemm_gpu"} & set(sys.modules))
sys.exit(code)
"""


@pytest.mark.parametrize("command", ["communication", "data", "growth", "model", "train"])
def test_a_wrong_key_is_told_without_the_libraries(command):
    wrong = [command, "--config", "configs/quickstart.yaml", "train.global_batch_siz=64"]
    done = subprocess.run([sys.executable, "-c", CALL, *wrong], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "train.global_batch_siz: no such key; the nearest is global_batch_size" in done.stderr
    assert done.stdout == "set()\n"
