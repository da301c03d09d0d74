"""Kernels of our own for CPUs in C++, which each process compiles for its cores."""

import ctypes
import functools
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dlrm_scale.errors import UserError
from dlrm_scale.host import cpp_compiler

FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fno-strict-aliasing -fopenmp -shared -fPIC".split()
# Rows of heads are shorter than the widest registers, which GCC would take for them and then not fill: 15 % slower.
X86_FLAGS = ["-mprefer-vector-width=256"]


class NoCompilerError(UserError):
    """There is no C++ compiler, or it does not compile a kernel."""


@functools.cache
def load_library(source: str) -> ctypes.CDLL:
    """Of a file in this folder. Raises NoCompilerError."""
    words = cpp_compiler()
    compiler, named = " ".join(words), ", which CXX names" if os.environ.get("CXX") else ""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/kernel.so"
        flags = [*FLAGS, *(X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else [])]
        command = [*words, *flags, str(Path(__file__).with_name(source)), "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            return ctypes.CDLL(library)
        except FileNotFoundError:
            raise NoCompilerError(f"there is no {compiler}{named}") from None
        except subprocess.TimeoutExpired as e:
            raise NoCompilerError(f"{compiler} takes more than {e.timeout:.0f} s to compile {source}") from None
        except subprocess.CalledProcessError as e:
            why = e.stderr.strip() or str(e)
            raise NoCompilerError(f"{compiler} does not compile {source}: {why.splitlines()[0]}") from None
        except OSError as e:
            raise NoCompilerError(f"what {compiler} makes of {source} does not load: {e}") from None


def call(
    source: str, function: str, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], *scalars: ctypes.c_float
) -> None:
    """`function` of contiguous tensors, sizes, other numbers, and the number of threads."""
    getattr(load_library(source), function)(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *map(ctypes.c_int64, sizes),
        *scalars,
        torch.get_num_threads(),
    )
