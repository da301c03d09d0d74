import warnings

import pytest
import torch

from dlrm_scale.models.attention import AttentionPooling, SelfAttention, plain_attention, rotary_table, rotate
from dlrm_scale.models.cpu_attention import SOURCE, rotary_attention
from dlrm_scale.models.cpu_library import NoCompilerError, load_library
from dlrm_scale.models.dense_trace import trace_dense
from dlrm_scale.models.ranking_model import build_model
from tests.support.model_inputs import run_config

B, N, D, HEADS = 3, 7, 16, 4


def mask(*lengths: int) -> torch.Tensor:
    return torch.arange(N) < torch.tensor(lengths)[:, None]


def head_by_head(q, k, v, valid):
    """One head, sample by sample, over the valid keys only."""
    out = []
    for sample in range(len(v)):
        keep = valid[sample]
        scores = q[sample] @ k[sample][keep].T / q.shape[-1] ** 0.5
        out.append(scores.softmax(-1) @ v[sample][keep])
    return torch.stack(out)


def turn(x, base=10_000.0):
    """RoFormer's rotation, pair by pair and position by position."""
    out = x.clone()
    for n in range(x.shape[-2]):
        for i in range(0, x.shape[-1], 2):
            angle = torch.tensor(n * base ** (-i / x.shape[-1]))
            a, b = x[..., n, i], x[..., n, i + 1]
            out[..., n, i] = a * angle.cos() - b * angle.sin()
            out[..., n, i + 1] = a * angle.sin() + b * angle.cos()
    return out


def test_self_attention_equals_a_plain_twin():
    torch.manual_seed(0)
    attention, x, valid = SelfAttention(D, HEADS, N, 10_000.0), torch.randn(B, N, D), mask(7, 4, 1)
    q, k, v = (x @ attention.qkv.weight.T).split(D, dim=-1)
    width = D // HEADS
    heads = [
        head_by_head(turn(q[..., cut]), turn(k[..., cut]), v[..., cut], valid)
        for cut in (slice(h * width, (h + 1) * width) for h in range(HEADS))
    ]
    expected = torch.cat(heads, dim=-1) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, valid.sum(1)), expected, atol=1e-5, rtol=1e-4)


def test_rotation_turns_each_pair_by_its_position():
    x = torch.randn(1, 1, 40, D)
    torch.testing.assert_close(rotate(x, rotary_table(50, D, 100.0)), turn(x, 100.0), atol=1e-4, rtol=1e-4)


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, D)
    table = rotary_table(40, D, 10_000.0)
    turned_q, turned_k = (rotate(x.expand(1, 1, 40, D), table)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in (-9, 0, 4):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert scores.diagonal(0)[0].sub(scores.diagonal(4)[0]).abs() > 1e-2


@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim"),
    [([7, 4, 1], 4, 4), ([64, 65, 130, 0, 3], 2, 16), ([33, 16], 1, 6), ([9], 3, 128)],
    ids=["short", "blocks", "odd width", "wide"],
)
def test_the_kernel_of_cpus_equals_the_plain_twin(lengths, heads, head_dim):
    """Scores of some tens, so that a softmax without its maximum, or a key out of sight, would show."""
    torch.manual_seed(0)
    lengths_B, num_tokens = torch.tensor(lengths), max(lengths) + 2
    given = (2 * torch.randn(len(lengths), num_tokens, 3 * heads * head_dim)).bfloat16()
    grad = torch.randn(len(lengths), num_tokens, heads * head_dim).bfloat16()
    rotary = rotary_table(num_tokens + 5, head_dim, 100.0)
    valid_BN1 = torch.arange(num_tokens).lt(lengths_B[:, None]).unsqueeze(2)

    def out_and_gradient(attend, given, lengths_B):
        leaf = given.clone().requires_grad_()
        out = attend(leaf, rotary, lengths_B, heads) * valid_BN1
        out.backward(grad.to(out.dtype))
        return out, leaf.grad

    exact = out_and_gradient(plain_attention, given.float(), lengths_B.clamp(min=1))
    plain = out_and_gradient(plain_attention, given, lengths_B.clamp(min=1))
    mine = out_and_gradient(rotary_attention, given, lengths_B)
    for result, twin, reference in zip(mine, plain, exact, strict=True):
        assert result.dtype == torch.bfloat16
        assert (result.float() - reference).norm() <= (twin.float() - reference).norm() < 2e-2 * reference.norm()
        assert result.masked_select(~valid_BN1).eq(0).all()


def test_many_equal_weights_are_not_rounded_before_they_are_summed():
    """1 / 300 in bf16 is off by the same part for each key, which no sum evens out."""
    torch.manual_seed(0)
    num_keys, width = 300, D // HEADS
    values = torch.randn(1, num_keys, D).bfloat16()
    qkv = torch.cat((torch.zeros(1, num_keys, 2 * D).bfloat16(), values), dim=2)
    out = rotary_attention(qkv, rotary_table(num_keys, width, 100.0), torch.tensor([num_keys]), HEADS)
    rounded_once = values.double().mean(1, keepdim=True).bfloat16().expand_as(out)
    torch.testing.assert_close(out, rounded_once, atol=0, rtol=2**-14)


def test_the_kernel_of_cpus_is_its_own_twin_in_other_threads():
    torch.manual_seed(0)
    qkv, rotary = torch.randn(50, N, 3 * D).bfloat16(), rotary_table(N, D // HEADS, 100.0)
    lengths_B, threads = torch.randint(1, N + 1, (50,)), torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        leaf = qkv.clone().requires_grad_()
        rotary_attention(leaf, rotary, lengths_B, HEADS).float().square().sum().backward()
        results.append(leaf.grad)
    torch.set_num_threads(threads)
    assert results[0].equal(results[1])


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_the_kernel_of_cpus_hands_on_what_is_not_finite(spoiled):
    qkv = torch.randn(2, N, 3 * D).bfloat16()
    qkv[1, 2, 3] = spoiled  # a query's: its row of the result and, backward, what its scores reach
    leaf = qkv.requires_grad_()
    out = rotary_attention(leaf, rotary_table(N, D // HEADS, 100.0), torch.tensor([N, N]), HEADS)
    out.float().sum().backward()
    assert out[0].isfinite().all() and leaf.grad[0].isfinite().all()
    assert not out[1, 2].isfinite().all() and not leaf.grad[1].isfinite().all()


@pytest.mark.parametrize(
    ("qkv", "num_positions"),
    [
        (torch.zeros(2, 5, 3 * D), 5),
        (torch.zeros(2, 5, 3 * D + 3).bfloat16(), 5),
        (torch.zeros(2, 5, 3 * D).bfloat16(), 4),
    ],
    ids=["fp32", "odd heads", "too few angles"],
)
def test_the_kernel_of_cpus_reads_nothing_outside(qkv, num_positions):
    with pytest.raises(ValueError, match=r"must be bf16|angles are of"):
        rotary_attention(qkv, rotary_table(num_positions, D // HEADS, 100.0), torch.tensor([5, 5]), HEADS)


@pytest.mark.parametrize("lengths", [[5], [5, 6], [-1, 5]])
def test_the_kernel_of_cpus_refuses_lengths_that_lead_outside(lengths):
    with pytest.raises(ValueError, match=r"they must be 2 from 0 to 5"):
        rotary_attention(
            torch.zeros(2, 5, 3 * D).bfloat16(), rotary_table(5, D // HEADS, 100.0), torch.tensor(lengths), HEADS
        )


def test_the_operators_of_the_kernel_keep_torch_s_rules():
    qkv = torch.randn(2, N, 3 * D).bfloat16().requires_grad_()
    inputs = (qkv, rotary_table(N, D // HEADS, 100.0), torch.tensor([N, 3]), HEADS)
    torch.library.opcheck(torch.ops.dlrm_scale.rotary_attention.default, inputs)


@pytest.fixture
def fresh_library():
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "why"), [("no_such_compiler", "there is no no_such_compiler"), ("false", "does not compile")]
)
def test_without_a_compiler_it_says_so_and_runs_pytorch_s(monkeypatch, fresh_library, compiler, why):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(NoCompilerError, match=why):
        load_library(SOURCE)
    config = run_config(precision="bf16")
    with pytest.warns(UserWarning, match=r"PyTorch's kernels.*g\+\+"):
        model = build_model(config, table_device=torch.device("meta"), dense_device=torch.device("cpu"))
    assert all(layer.attention.attend is plain_attention for layer in model.dense.arch.sequences)


def test_a_compiler_of_two_words_compiles(monkeypatch, fresh_library):
    monkeypatch.setenv("CXX", "env c++")
    load_library(SOURCE)


def test_planning_compiles_nothing_and_says_nothing(monkeypatch, fresh_library):
    monkeypatch.setenv("CXX", "no_such_compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace_dense(run_config(precision="bf16"), B)
    assert load_library.cache_info().misses == 0


def test_bf16_on_a_cpu_takes_the_kernel():
    config = run_config(precision="bf16")
    model = build_model(config, table_device=torch.device("meta"), dense_device=torch.device("cpu"))
    assert all(layer.attention.attend is rotary_attention for layer in model.dense.arch.sequences)


def test_pooling_equals_a_plain_twin():
    torch.manual_seed(0)
    pooling, x, valid = AttentionPooling(D, HEADS, num_queries=2), torch.randn(B, N, D), mask(7, 4, 1)
    k, v = (x @ pooling.kv.weight.T).split(D, dim=-1)
    width = D // HEADS
    heads = [
        head_by_head(pooling.queries_Qd[:, cut].expand(B, -1, -1), k[..., cut], v[..., cut], valid)
        for cut in (slice(h * width, (h + 1) * width) for h in range(HEADS))
    ]
    expected = torch.cat(heads, dim=-1) @ pooling.out.weight.T
    torch.testing.assert_close(pooling(x, valid), expected, atol=1e-5, rtol=1e-4)


def test_pooling_nothing_gives_zeros_and_finite_gradients():
    pooling, x = AttentionPooling(D, HEADS, num_queries=2), torch.randn(B, N, D, requires_grad=True)
    pooled = pooling(x, mask(0, 3, 0))
    pooled.square().sum().backward()
    assert pooled[0].eq(0).all() and pooled[1].ne(0).any()
    assert x.grad.isfinite().all() and x.grad[0].eq(0).all()
