import pytest
import torch

from dlrm_scale.errors import ConfigError
from dlrm_scale.models.inputs import categorical_vectors, sequence_means
from dlrm_scale.models.ranking_model import build_model
from tests.support.model_inputs import FEATURES, random_batch, run_config, with_features

CPU = torch.device("cpu")
NO_SEQUENCES = with_features(
    sequences=[], tables={name: table for name, table in FEATURES["tables"].items() if name != "cate"}
)


def build(features: dict | None = None, **model: object):
    config = run_config(features, **model)
    return build_model(config, table_device=CPU, dense_device=CPU), random_batch(config.features, 8), config.features


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)[1].logits_BT


def tokens_of(model, batch, schema) -> list[torch.Tensor]:
    """The tokens by hand: bottom MLP with a ReLU at its end, features, means of the sequences' fields."""
    pooled, embedded = model.embeddings(batch.bags, batch.sequences)
    x = batch.dense_BF
    for layer in model.dense.arch.tokens.bottom.modules():
        if isinstance(layer, torch.nn.Linear):
            x = (x @ layer.weight.T + layer.bias).relu()
    return [x, *categorical_vectors(schema, pooled, embedded), *sequence_means(schema, embedded)]


@pytest.mark.parametrize("arch", ["dlrm", "dlrm_dcnv2", "logistic"])
@pytest.mark.parametrize(
    "features", [FEATURES, NO_SEQUENCES, with_features(dense=[])], ids=["all", "no seq", "no dense"]
)
def test_every_parameter_gets_a_gradient(arch, features):
    model, batch, _ = build(features, arch=arch)
    model(batch)[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_dlrm_equals_its_definition():
    model, batch, schema = build(arch="dlrm")
    tokens = tokens_of(model, batch, schema)
    dots = [(tokens[i] * tokens[j]).sum(1, keepdim=True) for i in range(len(tokens)) for j in range(i)]
    expected = model.dense.arch.top(torch.cat((tokens[0], *dots), dim=1)).detach()
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-4)


def test_dcnv2_crosses_all_tokens_side_by_side():
    model, batch, schema = build(arch="dlrm_dcnv2", cross_rank=5, cross_layers=2)
    arch = model.dense.arch
    x0 = torch.cat(tokens_of(model, batch, schema), dim=1)
    x = x0
    for down, up in zip(arch.cross.down, arch.cross.up, strict=True):
        x = x0 * (x @ (up.weight @ down.weight).T + up.bias) + x
    torch.testing.assert_close(logits(model, batch), arch.top(x).detach(), atol=1e-5, rtol=1e-4)


def test_logistic_is_additive_in_the_features():
    """Changing one feature moves the logit by the same amount whatever the others are."""
    model, batch, _ = build(arch="logistic")
    other = random_batch(run_config().features, 8, seed=1)
    before = logits(model, batch)
    batch.dense_BF, swapped_dense = other.dense_BF, batch.dense_BF
    step = logits(model, batch) - before
    batch.bags = other.bags
    with_other_bags = logits(model, batch)
    batch.dense_BF = swapped_dense
    torch.testing.assert_close(with_other_bags - logits(model, batch), step, atol=1e-5, rtol=1e-4)
    assert step.abs().min() > 1e-4


def test_dlrm_of_one_token_is_refused():
    features = {"tables": {"user": FEATURES["tables"]["user"]}, "categorical": [{"name": "user_id", "table": "user"}]}
    with pytest.raises(ConfigError, match=r"take model\.arch=logistic"):
        build(features, arch="dlrm")
