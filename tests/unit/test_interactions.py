import torch

from dlrm_scale.models.dhen import InteractionArch
from dlrm_scale.models.interactions import LowRankCross, PairwiseDots
from dlrm_scale.models.layers import NORM_EPS
from tests.support.model_inputs import run_config


def test_low_rank_cross_equals_full_matrices():
    torch.manual_seed(0)
    cross, x0 = LowRankCross(width=12, num_layers=3, rank=4), torch.randn(5, 12)
    x = x0
    for down, up in zip(cross.down, cross.up, strict=True):
        torch.nn.init.normal_(up.bias)
        full_DD = up.weight @ down.weight
        x = x0 * (x @ full_DD.T + up.bias) + x
    torch.testing.assert_close(cross(x0), x)


def test_dots_are_all_pairs_of_different_tokens():
    tokens = torch.randn(3, 5, 4)
    expected = torch.stack([(tokens[:, i] * tokens[:, j]).sum(-1) for i in range(5) for j in range(i)], dim=1)
    torch.testing.assert_close(PairwiseDots(5)(tokens), expected)


def dhen_twin(arch: InteractionArch, z: torch.Tensor, concat: bool) -> torch.Tensor:
    dhen = arch.dhen
    dot, dcn = dhen.parts
    pairs = torch.stack([(z[:, i] * z[:, j]).sum(-1) for i in range(z.shape[1]) for j in range(i)], dim=1)
    dot_tokens = dot.project(pairs).reshape(len(z), -1, z.shape[2])
    dcn_tokens = dcn.project(dcn.cross(z.reshape(len(z), -1))).reshape(len(z), -1, z.shape[2])
    joined = dhen.join(torch.cat((dot_tokens, dcn_tokens), 2)) if concat else dot_tokens + dcn_tokens
    mixed = joined + torch.einsum("oi,bid->bod", dhen.shortcut.weight_OI, z)
    centred = mixed - mixed.mean(-1, keepdim=True)
    return arch.mlp(centred / (mixed.var(-1, unbiased=False, keepdim=True) + NORM_EPS).sqrt())


def test_interaction_arch_equals_its_definition():
    z = torch.randn(4, 7, 8)
    for ensemble in ("sum", "concat"):
        arch = InteractionArch(num_in=7, num_out=3, config=run_config(ensemble=ensemble).model)
        torch.testing.assert_close(arch(z), dhen_twin(arch, z, ensemble == "concat"), atol=1e-5, rtol=1e-4)


def test_gradients_of_the_norm_add_up_in_fp32():
    arch, tokens, found = InteractionArch(5, 3, run_config().model), torch.randn(8000, 5, 8), []
    for dtype in (torch.float32, torch.bfloat16):
        arch.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = arch(tokens.to(dtype))
        out.float().sum().backward()
        found.append((arch.dhen.norm.weight.grad, arch.dhen.norm.bias.grad))
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() <= 0.03 * exact.norm()
