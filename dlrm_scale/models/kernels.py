"""Which of our own kernels an arch runs with on a device."""

import shutil
import warnings
from importlib.util import find_spec

import torch
from torch import nn

from dlrm_scale.config import RunConfig
from dlrm_scale.errors import ConfigError
from dlrm_scale.host import cpp_compiler
from dlrm_scale.models import cpu_attention, cpu_pffn
from dlrm_scale.models.attention import SelfAttention
from dlrm_scale.models.bf16_linear import linear_in_bf16
from dlrm_scale.models.cpu_library import NoCompilerError, load_library
from dlrm_scale.models.layers import Linear
from dlrm_scale.models.pffn import TwoLayerPFFN

OLDEST_GPU = (8, 0)  # compute capability: FBGEMM 1.8.0 has no code for older ones


def choose_kernels(arch: nn.Module, config: RunConfig, device: torch.device, *, to_run: bool = True) -> None:
    """Gives the arch's modules the kernels that suit `device`, compiled; without `to_run`, for fake tensors, they need not be, and
    the device need not be there.

    Raises:
        ConfigError: the device cannot run one that `config` asks for.
    """
    if fuses_pffn(config, device, to_run=to_run):
        from dlrm_scale.models.pffn_triton import fused_pffn

        for module in arch.modules():
            if isinstance(module, TwoLayerPFFN):
                module.fused = fused_pffn
    if device.type == "cpu" and config.train.precision == "bf16":
        _choose_for_bf16_on_cpu(list(arch.modules()), to_run)


def _choose_for_bf16_on_cpu(modules: list[nn.Module], to_run: bool) -> None:
    for module in modules:
        if isinstance(module, Linear):
            module.product = linear_in_bf16
    attentions = [module for module in modules if isinstance(module, SelfAttention)]
    pffns = [module for module in modules if isinstance(module, TwoLayerPFFN) and _suits_cpu(module)]
    sources = ([cpu_attention.SOURCE] if attentions else []) + ([cpu_pffn.SOURCE] if pffns else [])
    if _compile(sources) if to_run else _has_compiler():
        for attention in attentions:
            attention.attend = cpu_attention.rotary_attention
        for pffn in pffns:
            pffn.fused = cpu_pffn.pffn_on_cpu


def _suits_cpu(pffn: TwoLayerPFFN) -> bool:
    return pffn.fused is None and cpu_pffn.suits(dim=len(pffn.bias2_d), hidden=len(pffn.bias1_K))


def _compile(sources: list[str]) -> bool:
    """All of them; else says why not."""
    try:
        for source in sources:
            load_library(source)
    except NoCompilerError as e:
        warnings.warn(
            f"attention and PFFN run by PyTorch's kernels, which are slow in bf16 on a CPU, since {e}; install a C++ compiler (g++)",
            stacklevel=2,
        )
        return False
    return True


def _has_compiler() -> bool:
    """What `load_library` calls; whether it compiles is not tried."""
    return shutil.which(cpp_compiler()[0]) is not None


def with_torch_pffn(config: RunConfig) -> RunConfig:
    """On a GPU by PyTorch's operations; a CPU has its own kernel either way."""
    if config.model.arch != "interformer":
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"pffn_kernel": "torch"})})


def fuses_pffn(config: RunConfig, device: torch.device, *, to_run: bool = True) -> bool:
    """Raises ConfigError: model.pffn_kernel is triton, and it cannot run; without `to_run`, it is not used."""
    model = config.model
    if model.arch != "interformer" or model.pffn_kernel == "torch":
        return False
    why_not = _why_not_fused(config, device, to_run)
    if why_not and to_run and model.pffn_kernel == "triton":
        raise ConfigError(f"model.pffn_kernel is triton, but {why_not}; set model.pffn_kernel=torch or auto")
    return why_not is None


def _why_not_fused(config: RunConfig, device: torch.device, to_run: bool) -> str | None:
    model, train = config.model, config.train
    if model.mode == "sole" or model.pffn != "two_layer":
        return f"model.mode {model.mode} with model.pffn {model.pffn} has no two_layer PFFN"
    if find_spec("triton") is None:
        return "Triton is not installed"
    from dlrm_scale.models.pffn_triton import INTERPRETED, MAX_DIM

    if model.dim > MAX_DIM:
        return f"model.dim is {model.dim}, and its blocks hold at most {MAX_DIM}"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the device is {device.type}, and it needs CUDA"
    if to_run and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    if train.precision == "fp32" and not train.tf32:
        return "strict fp32 products have no tensor cores, without which it is slow (train.precision=bf16 or train.tf32=true has them)"
    return None
