"""The dense arch on one GPU: the fused PFFN beside its twin, alone and in compiled and bf16 archs; TF32; the benchmark."""

import json
import subprocess
import sys

import pytest
import torch

from dlrm_scale.config import RunConfig
from dlrm_scale.models.kernels import fuses_pffn
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.training.device import set_product_precision
from tests.support.model_inputs import random_batch, run_config
from tests.support.pffn_twins import both, errors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda")
SHAPES = ((2, 70, 16, 32), (3, 5, 20, 24), (8, 204, 128, 128), (4, 1004, 256, 256), (2, 104, 256, 512))
ALLOWED = {"fp32": 5e-6, "tf32": 5e-3, "bf16": 3e-2}  # of the plain twin, over the result's norm


@pytest.fixture(autouse=True)
def strict_products():
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("precision", ALLOWED)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_the_fused_pffn_is_as_near_to_fp64_as_the_plain_twin(shape, precision):
    from dlrm_scale.models.pffn_triton import fused_pffn

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    found = errors(fused_pffn, shape, "cuda", precision == "bf16")
    wrong = {
        name: (mine, plain)
        for name, (mine, plain) in found.items()
        if not mine <= max(3 * plain, 2e-6) or not plain < ALLOWED[precision]
    }
    assert len(found) == 13 and wrong == {}


def test_two_runs_of_the_fused_pffn_give_the_same_bits():
    from dlrm_scale.models.pffn_triton import fused_pffn

    first, second = (both(fused_pffn, (8, 204, 128, 128), "cuda", bf16=True)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def logits_and_gradients(config: RunConfig) -> dict[str, torch.Tensor]:
    set_product_precision(config.train, CUDA)
    model = build_model(config, table_device=CUDA, dense_device=CUDA)
    for i, table in enumerate(model.embeddings.parameters()):
        torch.nn.init.normal_(table, generator=torch.Generator(device="cuda").manual_seed(i))
    loss, predictions = model(random_batch(config.features, 64).to(CUDA))
    loss.backward()
    return {"logits": predictions.logits_BT} | {name: p.grad for name, p in model.dense.named_parameters()}


def distance(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of logits and of all gradients together, the larger one, over the other's norm."""
    assert mine.keys() == other.keys() and len(mine) > 20
    gradients = [name for name in other if name != "logits"]
    return max(
        ((flat(mine, names) - flat(other, names)).norm() / flat(other, names).norm()).item()
        for names in (["logits"], gradients)
    )


def flat(tensors: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def of_train(config: RunConfig, **train: object) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_fast_arch_equals_the_plain_one(precision, kernel, compiled):
    plain = logits_and_gradients(run_config(dim=64))
    settings = {"tf32": True} if precision == "tf32" else {"precision": "bf16"}
    fast = of_train(run_config(dim=64, pffn_kernel=kernel), compile=compiled, **settings)
    assert fuses_pffn(fast, CUDA) == (kernel == "triton")
    found = distance(logits_and_gradients(fast), plain)
    assert 0 < found < {"tf32": 1e-2, "bf16": 5e-2}[precision]


def test_a_compiled_fp32_arch_equals_the_plain_one():
    assert (
        distance(logits_and_gradients(of_train(run_config(), compile=True)), logits_and_gradients(run_config())) < 1e-4
    )


def test_tf32_is_on_only_where_it_is_asked_for():
    a = torch.randn(256, 256, device=CUDA)
    exact, config = a.double() @ a.double(), run_config()
    set_product_precision(of_train(config, tf32=True).train, CUDA)
    rounded = (a @ a - exact).abs().max().item()
    set_product_precision(config.train, CUDA)
    assert rounded > 10 * (a @ a - exact).abs().max().item()


def test_the_model_benchmark_measures_the_gpu():
    command = [sys.executable, "-m", "tools.benchmark", "model", "--config", "configs/benchmark/interformer_t100.yaml"]
    command += ["--variant", "kernel", "train.precision=bf16", "model.pffn_kernel=triton", "--axis", "dim", "128"]
    done = subprocess.run([*command, "--seconds", "3", "--json"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device"] == torch.cuda.get_device_name()
    for row in result["rows"]:
        assert 0 < row["mfu"] < 1 and row["peak_bytes"] > 0
        assert row["step_ms"]["median"] > row["limits_ms"]["matrix"]
