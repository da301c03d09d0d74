import pytest
import torch
from torch.nn import functional

from dlrm_scale.models.layers import NORM_EPS
from dlrm_scale.models.pffn import build_pffn
from tests.support.model_inputs import run_config

FORMS = ["rank", "matrix", "two_layer", "gdpa"]
B, C, N, D, K, HEADS = 3, 4, 6, 16, 12, 2


def build(form: str, **model: object):
    config = run_config(pffn=form, dim=D, num_heads=HEADS, pffn_hidden=K, num_cls=C, **model).model
    return build_pffn(config, num_tokens=N)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()


def sample_twin(form: str, pffn, matrices, summary, tokens):
    """One sample of one form, with plain matrices."""
    if form == "rank":
        return tokens @ pffn.weight_dC @ rms(summary)
    if form == "matrix":
        return tokens @ matrices[0]
    if form == "two_layer":
        hidden = rms(functional.gelu(tokens @ matrices[0] + pffn.bias1_K)) * pffn.norm1.weight
        return rms(hidden @ matrices[1] + pffn.bias2_d) * pffn.norm2.weight
    keys, values = matrices
    width = D // HEADS
    heads = []
    for head in range(HEADS):
        cut = slice(head * width, (head + 1) * width)
        heads.append(functional.gelu(tokens[:, cut] @ keys[:, cut].T / N) @ values[:, cut])
    return torch.cat(heads, dim=1)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_equals_its_definition_sample_by_sample(form):
    torch.manual_seed(0)
    pffn, summary, tokens = build(form), torch.randn(B, C, D), torch.randn(B, N, D)
    for parameter in pffn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    matrices = [] if form == "rank" else pffn.hyper(summary)
    out = pffn(summary, tokens)
    for b in range(B):
        expected = sample_twin(form, pffn, [m[b] for m in matrices], summary[b], tokens[b])
        torch.testing.assert_close(out[b], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("summary_scale", [1e-4, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_output_variance_starts_near_the_input_variance(form, summary_scale):
    torch.manual_seed(0)
    ratios = []
    for _ in range(4):
        config = run_config(pffn=form, dim=32, num_heads=2).model
        pffn = build_pffn(config, num_tokens=24)
        summary, tokens = summary_scale * torch.randn(128, 4, 32), torch.randn(128, 24, 32)
        ratios.append(float(pffn(summary, tokens).detach().var()))
    assert 0.5 < sum(ratios) / len(ratios) < 2.0


@pytest.mark.parametrize("form", FORMS)
def test_the_sample_decides_what_is_done_to_its_tokens(form):
    torch.manual_seed(0)
    pffn, tokens = build(form), torch.randn(1, N, D).expand(2, N, D)
    one, other = pffn(torch.randn(2, C, D), tokens).detach()
    assert (one - other).std() > 0.2 * one.std()
