import torch

from dlrm_scale.models.attention import AttentionPooling, SelfAttention, attend, quarter_turn, rotary_table

B, N, D, HEADS = 3, 7, 16, 4


def mask(*lengths: int) -> torch.Tensor:
    return torch.arange(N) < torch.tensor(lengths)[:, None]


def plain_attention(q, k, v, valid):
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
        plain_attention(turn(q[..., cut]), turn(k[..., cut]), v[..., cut], valid)
        for cut in (slice(h * width, (h + 1) * width) for h in range(HEADS))
    ]
    expected = torch.cat(heads, dim=-1) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, valid), expected, atol=1e-5, rtol=1e-4)


def rotate(x_Nh, table_2Nh):
    cos_Nh, sin_Nh = table_2Nh
    return x_Nh * cos_Nh + quarter_turn(x_Nh.T).T * sin_Nh


def test_cosines_and_quarter_turns_make_the_rotation():
    x = torch.randn(40, D)
    torch.testing.assert_close(rotate(x, rotary_table(40, D, 100.0)), turn(x, 100.0), atol=1e-4, rtol=1e-4)


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, D)
    table = rotary_table(40, D, 10_000.0)
    turned_q, turned_k = rotate(q.expand(40, D), table), rotate(k.expand(40, D), table)
    scores = turned_q @ turned_k.T
    for distance in (-9, 0, 4):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert scores.diagonal(0)[0].sub(scores.diagonal(4)[0]).abs() > 1e-2


def test_bf16_attention_of_cpus_equals_the_fused_one_in_fp32():
    torch.manual_seed(0)
    rounded = [torch.randn(B, HEADS, N, D).bfloat16() for _ in range(4)]
    valid = mask(7, 4, 1)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, grad = (x.to(dtype) for x in rounded)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = attend(*inputs, valid)
        out.backward(grad)
        results.append([out, *(x.grad for x in inputs)])
        assert out.dtype == dtype
    for exact, got in zip(*results, strict=True):
        assert (got.float() - exact).norm() <= 0.01 * exact.norm()  # of bf16's 2^-8, through two products
    assert results[1][2][1, :, 4:].eq(0).all() and results[1][3][1, :, 4:].eq(0).all()  # keys and values out of sight


def test_pooling_equals_a_plain_twin():
    torch.manual_seed(0)
    pooling, x, valid = AttentionPooling(D, HEADS, num_queries=2), torch.randn(B, N, D), mask(7, 4, 1)
    k, v = (x @ pooling.kv.weight.T).split(D, dim=-1)
    width = D // HEADS
    heads = [
        plain_attention(pooling.queries_Qd[:, cut].expand(B, -1, -1), k[..., cut], v[..., cut], valid)
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
