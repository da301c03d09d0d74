"""What a configuration may ask of a device that lacks it."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from dlrm_scale.errors import ConfigError
from dlrm_scale.models.kernels import fuses_pffn
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.training.device import check_device
from tests.support.configs import tiny_config
from tests.support.model_inputs import run_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"tf32": True}, r"train\.tf32 is true, but only CUDA.*leave it out"),
        ({"pipeline": "prefetch"}, r"train\.pipeline is prefetch.*only CUDA.*set train\.pipeline=sparse_dist"),
    ],
)
def test_a_cpu_is_refused_what_only_cuda_has(train, said):
    check_device(tiny_config(), CPU)
    with pytest.raises(ConfigError, match=said):
        check_device(tiny_config(train=train), CPU)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({}, "needs CUDA" if find_spec("triton") else "not installed"),
        ({"pffn": "rank"}, "no two_layer PFFN"),
        ({"mode": "sole"}, "no two_layer PFFN"),
    ],
)
def test_a_kernel_that_cannot_run_is_an_error_where_it_was_asked_for_by_name(model, why):
    by_name = run_config(pffn_kernel="triton", **model)
    with pytest.raises(ConfigError, match=rf"pffn_kernel is triton, but .*{why}.*set model\.pffn_kernel=torch"):
        check_device(by_name, CPU)
    with pytest.raises(ConfigError, match=why):
        build_model(by_name, dense_device=CPU)
    assert not fuses_pffn(run_config(pffn_kernel="auto", **model), CPU)
    assert not fuses_pffn(run_config(arch="dlrm"), CPU)


def test_a_run_is_refused_before_it_makes_a_folder(tmp_path):
    command = [sys.executable, "-m", "dlrm_scale.training.main", "--config", "configs/quickstart.yaml", "device=cpu"]
    done = subprocess.run(
        [*command, "train.tf32=true", f"output.dir={tmp_path / 'run'}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("error: train.tf32 is true")
    assert not (tmp_path / "run").exists()
