import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from dlrm_scale.errors import ConfigError
from dlrm_scale.models.attention import SelfAttention
from dlrm_scale.models.interformer import InterFormer, SequenceArch
from dlrm_scale.models.length_chunks import LengthChunks
from dlrm_scale.models.ranking_model import build_model
from tests.support.model_inputs import FEATURES, random_batch, run_config, with_features

CPU = torch.device("cpu")
MODES = ("int", "s2n", "n2s", "sep")
TWO_SEQUENCES = [
    *FEATURES["sequences"],
    {"name": "seen", "max_length": 4, "fields": [{"name": "seen_item", "table": "item"}]},
]
OTHER_WIDTHS = {name: table | {"embedding_dim": 4} for name, table in FEATURES["tables"].items()} | {
    "user": {"num_embeddings": 40, "embedding_dim": 12}
}
FEATURE_VARIANTS = {
    "two sequences": with_features(sequences=TWO_SEQUENCES),
    "tables of other widths": with_features(tables=OTHER_WIDTHS),
    "no dense features": with_features(dense=[]),
}


def build(features: dict | None = None, **model: object):
    config = run_config(features, **model)
    torch.manual_seed(1)  # of the tables
    return build_model(config, table_device=CPU, dense_device=CPU), random_batch(config.features, 16)


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)[1].logits_BT


def dead_parameters(model, batch) -> list[str]:
    model(batch)[0].backward()
    return [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pffn", ["rank", "matrix", "two_layer", "gdpa", "none"])
def test_every_parameter_gets_a_gradient(mode, pffn):
    assert dead_parameters(*build(mode=mode, pffn=pffn)) == []


@pytest.mark.parametrize(
    "model",
    [
        {"gating": "none"},
        {"gating": "sigmoid"},
        {"gating": "tanh"},
        {"gating": "identity"},
        {"gating": "sigmoid_times_x"},
        {"num_pma": 0},
        {"num_recent": 0},
        {"attention": False},
        {"attention": False, "pffn": "none"},
        {"paper_literal": True},
        {"paper_literal": True, "pffn": "matrix"},
        {"pma_sees_cls": False},
        {"mask_activation": "sigmoid", "mask_ratio": 0.5},
        {"interactions": ["dot"]},
        {"interactions": ["dcn"], "ensemble": "concat"},
        {"dropout": 0.3},
        {"mode": "sole", "early_pooling": "mean"},
        {"mode": "sole", "early_pooling": "mlp"},
        {"mode": "sole", "early_pooling": "mha"},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient_in_each_variant(model):
    assert dead_parameters(*build(**model)) == []


@pytest.mark.parametrize("features", FEATURE_VARIANTS.values(), ids=FEATURE_VARIANTS)
@pytest.mark.parametrize("mode", ["int", "sole"])
def test_every_parameter_gets_a_gradient_with_other_features(features, mode):
    assert dead_parameters(*build(features, mode=mode)) == []


def test_sole_needs_no_sequence():
    features = with_features(sequences=[], tables={k: v for k, v in FEATURES["tables"].items() if k != "cate"})
    assert dead_parameters(*build(features, mode="sole")) == []


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_modes_cut_the_exchange(mode, num_layers):
    """Which summary depends on which input, also with one layer (the summaries after the loop are of its outputs)."""
    model, batch = build(mode=mode, num_layers=num_layers)
    arch, summaries = model.dense.arch, {}
    arch.final_x.register_forward_hook(lambda *call: summaries.update(x=call[-1]))
    arch.final_s.register_forward_hook(lambda *call: summaries.update(s=call[-1]))
    pooled, embedded = model.embeddings(batch.bags, batch.sequences)
    events = embedded["cate_hist"].values().detach().requires_grad_()
    embedded["cate_hist"] = JaggedTensor(events, lengths=embedded["cate_hist"].lengths())
    dense_BF = batch.dense_BF.requires_grad_()
    arch(dense_BF, pooled, embedded)

    def reads(summary: str, source: torch.Tensor) -> bool:
        (grad,) = torch.autograd.grad(summaries[summary].sum(), source, allow_unused=True, retain_graph=True)
        return grad is not None and bool(grad.abs().max() > 0)

    assert reads("x", dense_BF) and reads("s", events)
    assert reads("x", events) == (mode in ("int", "s2n"))
    assert reads("s", dense_BF) == (mode in ("int", "n2s"))


@pytest.mark.parametrize(
    "model", [{}, {"pma_sees_cls": False}, {"mode": "sole"}, {"mode": "sole", "early_pooling": "mha"}]
)
def test_wider_padding_changes_nothing(model):
    narrow, batch = build(**model)
    history = FEATURES["sequences"][0] | {"max_length": 11}
    wide, _ = build(with_features(sequences=[history]), **model)
    wide.load_state_dict(narrow.state_dict())
    torch.testing.assert_close(logits(wide, batch), logits(narrow, batch), atol=1e-5, rtol=1e-4)


def test_garbage_behind_the_last_event_changes_nothing():
    model, batch = build()
    before = logits(model, batch)

    def spoil(_module, _inputs, outputs):
        [events_BEd] = outputs
        lengths_B = batch.sequences["item_hist"].lengths()
        behind = torch.arange(events_BEd.shape[1]) >= lengths_B[:, None]
        return [torch.where(behind[:, :, None], 1e3 * torch.randn_like(events_BEd), events_BEd)]

    model.dense.arch.events.register_forward_hook(spoil)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", [{}, {"mode": "sole"}])
def test_order_of_events_matters_to_the_sequence_arch_only(model):
    built, batch = build(num_recent=0, **model)
    before = logits(built, batch)
    for key in ("item_hist", "cate_hist"):  # reverse every history
        lengths, values = batch.sequences[key].lengths().tolist(), batch.sequences[key].values()
        values.copy_(torch.cat([part.flip(0) for part in values.split(lengths)]))
    changed = (logits(built, batch) - before).abs().amax(1)
    longer_than_one = batch.sequences["item_hist"].lengths() > 1
    if model:
        assert changed.max() < 1e-5
    else:
        assert changed[longer_than_one].min() > 1e-5 and changed[~longer_than_one].max() < 1e-5


def test_a_batch_without_history_is_finite():
    model, batch = build(pma_sees_cls=False)
    full = batch.sequences
    batch.sequences = KeyedJaggedTensor(full.keys(), full.values()[:0], lengths=torch.zeros_like(full.lengths()))
    loss, predictions = model(batch)
    loss.backward()
    assert predictions.logits_BT.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_histories_of_unequal_length_are_joined_and_count_where_either_has_an_event():
    config = run_config(with_features(sequences=TWO_SEQUENCES))
    arch = InterFormer(config.features, config.model)
    width = {"item_hist": 8, "cate_hist": 8, "seen_item": 8}
    embedded = {
        key: JaggedTensor(torch.randn(sum(n), width[key]), lengths=torch.tensor(n))
        for key, n in {"item_hist": [1, 5], "cate_hist": [1, 5], "seen_item": [3, 2]}.items()
    }
    seen = []
    arch.events.unify.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    lengths_B = arch.events.lengths(embedded)
    [events_BEd] = arch.events(embedded, LengthChunks([2], [6]))
    assert lengths_B.tolist() == [3, 5] and events_BEd.shape == (2, 6, 8)
    present = seen[0].ne(0).unflatten(2, (3, 8)).any(3)  # sample, event, field
    assert present[0].int().tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1], [0] * 3, [0] * 3, [0] * 3]
    assert present[1].sum(0).tolist() == [5, 5, 2]


def test_paper_literal_is_equation_9_without_residual():
    torch.manual_seed(0)
    arch = SequenceArch(run_config(paper_literal=True, pffn="matrix").model, num_tokens=7)
    tokens, summary, lengths = torch.randn(2, 7, 8), torch.randn(2, 4, 8), torch.tensor([7, 5])
    expected = arch.attention(arch.pffn(summary, tokens), lengths)
    torch.testing.assert_close(arch(tokens, summary, lengths), expected)
    assert isinstance(arch.attention, SelfAttention)


@pytest.mark.parametrize(("num_layers", "millions"), [(1, 2.06), (2, 2.58), (3, 3.09)])
def test_size_on_amazon_is_that_of_the_paper_s_table(num_layers, millions):
    """Three layers of the `matrix` reading have about the 3.10M dense parameters of Table 3 (d = 64, 2 features, 2 fields)."""
    features = {
        "tables": {name: {"num_embeddings": 10, "embedding_dim": 64} for name in ("item", "cate")},
        "categorical": [{"name": "item_id", "table": "item"}, {"name": "cate_id", "table": "cate"}],
        "sequences": [
            {
                "name": "history",
                "max_length": 100,
                "fields": [{"name": "items", "table": "item"}, {"name": "cates", "table": "cate"}],
            }
        ],
    }
    size = {"dim": 64, "num_heads": 4, "dcn_rank": 32, "head_hidden": [1024, 512, 256, 128]}
    config = run_config(features, pffn="matrix", num_layers=num_layers, **size)
    parameters = InterFormer(config.features, config.model).parameters()
    assert sum(p.numel() for p in parameters) / 1e6 == pytest.approx(millions, rel=0.01)


def test_dots_of_one_token_are_refused_with_a_way_out():
    features = with_features(dense=[], categorical=[FEATURES["categorical"][0]])
    features["tables"] = {name: FEATURES["tables"][name] for name in ("item", "cate")}
    with pytest.raises(ConfigError, match=r"has 1; set model.interactions=\[dcn\]"):
        build(features, mode="sep")


def test_sequences_alone_are_refused():
    features = with_features(dense=[], categorical=[])
    features["tables"] = {name: FEATURES["tables"][name] for name in ("item", "cate")}
    with pytest.raises(ConfigError, match=r"add one to features\.dense or features\.categorical"):
        build(features)


def test_a_sequence_arch_that_nothing_reads_is_refused():
    with pytest.raises(ConfigError, match="nothing would read the events"):
        run_config(attention=False, num_pma=0, num_recent=0)
