"""InterFormer against a twin: Algorithm 1 and its equations written out, one sample at a time and without any padding.

The twin sees parameters by name and ids, never a module, so it can call no forward of the code it judges. That it pads
nothing makes it the judge of the masks too.
"""

# X non-sequence tokens  C CLS (= summary) tokens  E events of this sample  N = C + E  Y tokens of S_sum  Z = X + Y
# d token dim  h dim of a head  K hidden width of PFFN  Q pooling queries
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dlrm_scale.data.batch import RecBatch
from dlrm_scale.models.layers import RMSNorm
from dlrm_scale.models.masknet import MaskNet
from dlrm_scale.models.ranking_model import RankingModel, build_model
from tests.support.model_inputs import FEATURES, random_batch, run_config, with_features

Weights = dict[str, Tensor]
CPU = torch.device("cpu")
D, HEADS, PFFN_HIDDEN, NUM_CLS, NUM_RECENT, NUM_LAYERS, MAX_EVENTS = 8, 2, 12, 4, 2, 2, 6
ROPE_BASE, NORM_EPS = 10_000.0, 1e-10
# The tables that the sequence reads are wider than d and projected; the others pass.
WIDE_EVENTS = with_features(
    tables=FEATURES["tables"]
    | {"item": {"num_embeddings": 50, "embedding_dim": 12}, "cate": {"num_embeddings": 10, "embedding_dim": 12}}
)


def under(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(f"{prefix}."): value for name, value in w.items() if name.startswith(f"{prefix}.")}


def affine(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def two_layers(x: Tensor, w: Weights, prefix: str) -> Tensor:
    return affine(functional.silu(affine(x, w, f"{prefix}.0")), w, f"{prefix}.2")


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()


def turn(x_Nh: Tensor) -> Tensor:
    """RoFormer: pair i of position n turns by n base^(-2i/h)."""
    num_tokens, head_dim = x_Nh.shape
    angle = torch.outer(torch.arange(num_tokens).float(), ROPE_BASE ** (-torch.arange(0, head_dim, 2) / head_dim))
    even, odd = x_Nh[:, 0::2], x_Nh[:, 1::2]
    turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(turned, dim=-1).flatten(1)


def attend(q_d: Tensor, k_Nd: Tensor, v_Nd: Tensor, rotary: bool) -> Tensor:
    """Eq. 3 without the output projection: per head softmax(q k^T / sqrt(h)) v."""
    heads = []
    for q, k, v in zip(*(x.chunk(HEADS, dim=-1) for x in (q_d, k_Nd, v_Nd)), strict=True):
        if rotary:
            q, k = turn(q), turn(k)
        heads.append((q @ k.T / (D / HEADS) ** 0.5).softmax(-1) @ v)
    return torch.cat(heads, dim=-1)


def masknet(events_E: Tensor, w: Weights) -> Tensor:
    """Eq. 6: MLP_lce(S * MLP_mask(S))."""
    return affine(events_E * two_layers(events_E, w, "mask"), w, "mix")


def gate(x: Tensor, w: Weights) -> Tensor:
    return x * torch.sigmoid(two_layers(x, w, "gate.mlp"))


def x_summary(x_Xd: Tensor, w: Weights) -> Tensor:
    """Eq. 10: Gating(LCE(X))."""
    return gate(w["mix.weight_OI"] @ x_Xd, w)


def s_summary(s_Nd: Tensor, w: Weights) -> Tensor:
    """Eq. 11: Gating([S_CLS || S_PMA || S_recent]); zeros in front where there are fewer events than asked for."""
    k_Nd, v_Nd = (s_Nd @ w["pma.kv.weight"].T).chunk(2, dim=-1)
    pooled_Qd = attend(w["pma.queries_Qd"], k_Nd, v_Nd, rotary=False) @ w["pma.out.weight"].T
    recent = torch.cat((torch.zeros(NUM_RECENT, D), s_Nd[NUM_CLS:]))[-NUM_RECENT:]
    return gate(torch.cat((s_Nd[:NUM_CLS], pooled_Qd, recent)), w)


def interaction(z_Zd: Tensor, w: Weights) -> Tensor:
    """Eq. 7: MLP(DHEN(Z)), DHEN = LayerNorm(dot + cross + shortcut)."""
    dhen = under(w, "dhen")
    dots = torch.stack([z_Zd[i] @ z_Zd[j] for i in range(len(z_Zd)) for j in range(i)])
    dot_Xd = functional.silu(affine(dots, dhen, "parts.0.project.0")).reshape(-1, D)
    x0 = x = z_Zd.flatten()
    for layer in range(2):
        down, up = dhen[f"parts.1.cross.down.{layer}.weight"], f"parts.1.cross.up.{layer}"
        x = x0 * affine(down @ x, dhen, up) + x
    cross_Xd = affine(x, dhen, "parts.1.project").reshape(-1, D)
    joined_Xd = dot_Xd + cross_Xd + dhen["shortcut.weight_OI"] @ z_Zd
    centred = joined_Xd - joined_Xd.mean(-1, keepdim=True)  # a centred row's RMS is its standard deviation
    return two_layers(rms(centred) * dhen["norm.weight"] + dhen["norm.bias"], w, "mlp")


def sequence(s_Nd: Tensor, x_sum_Cd: Tensor, w: Weights) -> Tensor:
    """Eq. 9 with pre-norm residuals: S += PFFN(X_sum, S), then S += MHA(S). PFFN has two layers with norms."""
    hidden_d = functional.silu(affine(rms(x_sum_Cd.flatten()), w, "pffn.hyper.trunk"))
    weight1_dK = affine(hidden_d, w, "pffn.hyper.heads.0").reshape(D, PFFN_HIDDEN)
    weight2_Kd = affine(hidden_d, w, "pffn.hyper.heads.1").reshape(PFFN_HIDDEN, D)
    normed_Nd = rms(s_Nd) * w["pffn_norm.weight"]
    inner_NK = rms(functional.gelu(normed_Nd @ weight1_dK + w["pffn.bias1_K"])) * w["pffn.norm1.weight"]
    s_Nd = s_Nd + w["pffn_scale_d"] * rms(inner_NK @ weight2_Kd + w["pffn.bias2_d"]) * w["pffn.norm2.weight"]
    normed_Nd = rms(s_Nd) * w["attention_norm.weight"]
    q_Nd, k_Nd, v_Nd = (normed_Nd @ w["attention.qkv.weight"].T).chunk(3, dim=-1)
    return s_Nd + w["attention_scale_d"] * (attend(q_Nd, k_Nd, v_Nd, rotary=True) @ w["attention.out.weight"].T)


def tokens(w: Weights, batch: RecBatch, sample: int) -> tuple[Tensor, Tensor]:
    """X^(1) (Eq. 5), and the concatenated fields of each event."""
    item, cate = w["embeddings.ec.embeddings.item.weight"], w["embeddings.ec.embeddings.cate.weight"]
    bags = "embeddings.ebc.embedding_bags"
    ids = {k: kjt[k].to_dense()[sample] for kjt in (batch.bags, batch.sequences) for k in kjt.keys()}
    arch = under(w, "dense.arch")
    x_Xd = [
        batch.dense_BF[sample] @ arch["features.dense.weight"].T,
        item[ids["item_id"]].sum(0) @ arch["features.project.by_table.item.weight"].T,
        w[f"{bags}.user.weight"][ids["user_id"]].sum(0),
        w[f"{bags}.tags.weight"][ids["tag_ids"]].sum(0) / max(1, len(ids["tag_ids"])),
    ]
    fields = [
        item[ids["item_hist"]] @ arch["events.project.by_table.item.weight"].T,
        cate[ids["cate_hist"]] @ arch["events.project.by_table.cate.weight"].T,
    ]
    return torch.stack(x_Xd), torch.cat(fields, dim=1)


def twin_logits(weights: Weights, batch: RecBatch, sample: int) -> Tensor:
    """Algorithm 1, with the summaries of the last layer's outputs for the head."""
    x_Xd, fields = tokens(weights, batch, sample)
    w = under(weights, "dense.arch")
    s_Nd = torch.cat((x_summary(x_Xd, under(w, "x_summaries.0")), masknet(fields, under(w, "events.unify"))))
    for layer in range(NUM_LAYERS):
        x_sum_Cd = x_summary(x_Xd, under(w, f"x_summaries.{layer}"))
        s_sum_Yd = s_summary(s_Nd, under(w, f"s_summaries.{layer}"))
        x_Xd = interaction(torch.cat((x_Xd, s_sum_Yd)), under(w, f"interactions.{layer}"))
        s_Nd = sequence(s_Nd, x_sum_Cd, under(w, f"sequences.{layer}"))
    last = torch.cat((x_summary(x_Xd, under(w, "final_x")), s_summary(s_Nd, under(w, "final_s"))))
    return two_layers(last.flatten(), w, "head")


def unsettle(module: torch.nn.Module) -> None:
    """Moves biases and norms' scales off the zeros and ones that they start at, where many an error is invisible."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)


def build() -> tuple[RankingModel, RecBatch]:
    config = run_config(WIDE_EVENTS, num_layers=NUM_LAYERS, pffn_hidden=PFFN_HIDDEN)
    torch.manual_seed(1)  # of the tables and the noise
    model = build_model(config, table_device=CPU, dense_device=CPU)
    unsettle(model.dense)
    return model, random_batch(config.features, 24)


def test_logits_equal_the_twin_s_for_every_length_of_history():
    model, batch = build()
    assert set(batch.sequences["item_hist"].lengths().tolist()) == set(range(MAX_EVENTS + 1))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        logits_BT = model(batch)[1].logits_BT
    expected_BT = torch.stack([twin_logits(weights, batch, sample) for sample in range(len(logits_BT))])
    assert expected_BT.std(0).min() > 0.1  # the samples differ, so equality says something
    torch.testing.assert_close(logits_BT, expected_BT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["none", "sigmoid"])
def test_masknet_is_equation_6(activation):
    torch.manual_seed(0)
    net, events = MaskNet(num_fields=3, dim=D, ratio=0.5, activation=activation), torch.randn(3, 5, 3 * D)
    unsettle(net)
    w = dict(net.named_parameters())
    if activation == "none":
        expected = masknet(events, w)
    else:
        expected = affine(events * torch.sigmoid(two_layers(events, w, "mask")), w, "mix")
    assert w["mask.0.weight"].shape == (3 * D // 2, 3 * D)
    torch.testing.assert_close(net(events), expected, atol=1e-6, rtol=1e-5)


def test_rms_norm_is_fp32_under_autocast():
    torch.manual_seed(0)
    norm = RMSNorm(64)
    unsettle(norm)
    x = (torch.randn(5, 64) * torch.logspace(-4, 2, 5)[:, None]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), rms(x.double()) * norm.weight.double(), atol=1e-6, rtol=1e-6)
