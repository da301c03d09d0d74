"""`python -m tests.support.pffn_parity`: how far Triton's interpreter is from the plain PFFN's twin in fp64, as JSON.

Triton decides at its import whether it interprets, so that this needs a process of its own (TRITON_INTERPRET=1).
"""

import json

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

from dlrm_scale.models.pffn_triton import fused_pffn
from tests.support.pffn_twins import errors

# samples, tokens, d, K: of several blocks, of less than one, of no multiple of 16, and with a K of several blocks
SHAPES = ((2, 70, 16, 32), (3, 5, 20, 24), (1, 65, 136, 40), (2, 9, 16, 70))


def multiply_bf16() -> None:
    """Triton 3.7.1's interpreter holds bf16 as 16-bit integers, and multiplies those; after this, its products are of the numbers."""
    dot = InterpreterBuilder.create_dot

    def as_fp32(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle(_convert_float(x.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, as_fp32(a), as_fp32(b), *rest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    multiply_bf16()
    cases = [(shape, False) for shape in SHAPES] + [(shape, True) for shape in SHAPES[:2]]
    print(
        json.dumps(
            [{"shape": shape, "bf16": bf16, "errors": errors(fused_pffn, shape, "cpu", bf16)} for shape, bf16 in cases]
        )
    )
