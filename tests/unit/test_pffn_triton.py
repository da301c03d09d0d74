"""The fused PFFN without a GPU: its numbers by Triton's interpreter, and that Triton compiles it for the GPUs we name."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install -e .[dev]")

SHARED_MEMORY_BYTES = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # of a block, CUDA programming guide, table of capabilities
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}


def test_kernels_are_as_near_to_fp64_as_the_plain_twin():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.support.pffn_parity"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)
    assert {case["bf16"] for case in cases} == {False, True}
    for case in cases:
        allowed = 3e-2 if case["bf16"] else 5e-6  # should the twin be worse than that, the case shows nothing
        wrong = {
            name: (mine, plain)
            for name, (mine, plain) in case["errors"].items()
            if not mine <= max(3 * plain, 1e-6) or not plain < allowed
        }
        assert len(case["errors"]) == 13 and wrong == {}, case["shape"]


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize(
    ("dtype", "dim", "capability"),
    [(torch.bfloat16, 256, 80), (torch.bfloat16, 256, 90), (torch.float32, 256, 90)],
)
def test_triton_compiles_for_tensor_cores_within_the_shared_memory(kernel, dtype, dim, capability):
    from tests.support.pffn_compiled import compiled

    shared_bytes, ptx = compiled(kernel, dtype, dim, capability)
    assert 0 < shared_bytes <= SHARED_MEMORY_BYTES[capability]
    tensor_cores = (
        "mma.sync" if dtype == torch.float32 else TENSOR_CORES[capability]
    )  # rows of 32 are too few for wgmma
    assert tensor_cores in ptx
