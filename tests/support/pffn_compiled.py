"""What Triton makes of the PFFN's kernels for GPUs that need not be there: the compiler comes with it."""

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dlrm_scale.models import pffn_triton

IN_FP32 = ("bias1_K", "scale1_K", "bias2_d", "scale2_d", "out_BNd", "inverse_rms_BN", "grad_BNd", "sums_K2", "sums_d2")


def compiled(kernel: str, dtype: torch.dtype, dim: int, compute_capability: int) -> tuple[int, str]:
    """Bytes of shared memory that a block takes, and the PTX. fp32 stands for TF32, of K = d."""
    function = getattr(pffn_triton, f"_{kernel}_kernel")
    blocks = pffn_triton._blocks(dtype, dim)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"d": dim, "K": dim, "PRECISION": "ieee" if dtype == torch.bfloat16 else "tf32", **blocks}
    element = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    types = {name: "*fp32" if name in IN_FP32 else element for name in function.arg_names}
    types |= {name: "constexpr" for name in constants} | {"num_tokens": "i32", "eps": "fp32"}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if types[name].startswith("*")
    }
    source = ASTSource(function, types, constants, aligned)
    built = compile(source, target=GPUTarget("cuda", compute_capability, 32), options=options)
    return built.metadata.shared, built.asm["ptx"]
