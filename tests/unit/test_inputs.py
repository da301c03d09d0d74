import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from dlrm_scale.errors import ConfigError
from dlrm_scale.models.embeddings import Embeddings
from dlrm_scale.models.inputs import categorical_vectors, pad_events, sequence_means
from tests.support.model_inputs import FEATURES, random_batch, run_config, with_features

CPU = torch.device("cpu")


@pytest.fixture
def schema():
    return run_config().features


def test_tables_that_a_sequence_reads_are_in_the_embedding_collection(schema):
    embeddings = Embeddings(schema)
    assert {c.name: c.feature_names for c in embeddings.ec.embedding_configs()} == {
        "item": ["item_hist", "item_id"],
        "cate": ["cate_hist"],
    }
    bags = embeddings.ebc.embedding_bag_configs()
    assert {c.name: (c.feature_names, c.pooling.value) for c in bags} == {
        "user": (["user_id"], "SUM"),
        "tags": (["tag_ids"], "MEAN"),
    }
    assert all(p.is_meta for p in embeddings.parameters())


def test_a_schema_without_sequences_has_no_embedding_collection():
    features = with_features(
        tables={"user": FEATURES["tables"]["user"]},
        categorical=[{"name": "user_id", "table": "user"}],
        sequences=[],
    )
    embeddings = Embeddings(run_config(features, mode="sole").features)
    assert embeddings.ec is None and embeddings.ebc is not None


def test_sequence_tables_of_two_widths_are_refused_by_name():
    tables = FEATURES["tables"] | {"cate": {"num_embeddings": 10, "embedding_dim": 4}}
    with pytest.raises(ConfigError, match="item: 8, cate: 4"):
        Embeddings(run_config(with_features(tables=tables)).features)


def test_vectors_are_those_of_each_feature_in_schema_order(schema):
    embeddings, batch = Embeddings(schema, CPU), random_batch(schema, 9)
    vectors = categorical_vectors(schema, *embeddings(batch.bags, batch.sequences))
    weights = dict(embeddings.named_parameters())
    for f, vectors_BD in zip(schema.categorical, vectors, strict=True):
        kjt = batch.bags if f.name in schema.bag_keys else batch.sequences
        group = "ebc.embedding_bags" if f.name in schema.bag_keys else "ec.embeddings"
        table = weights[f"{group}.{f.table}.weight"]
        bags = kjt[f.name].to_dense()
        expected = torch.stack([table[ids].mean(0) if len(ids) else torch.zeros(8) for ids in bags])
        torch.testing.assert_close(vectors_BD, expected)


def test_sequence_mean_is_over_the_events_there_are(schema):
    embeddings, batch = Embeddings(schema, CPU), random_batch(schema, 9)
    means = sequence_means(schema, embeddings(None if embeddings.ebc is None else batch.bags, batch.sequences)[1])
    table = embeddings.ec.embeddings["cate"].weight
    expected = [table[ids].mean(0) if len(ids) else torch.zeros(8) for ids in batch.sequences["cate_hist"].to_dense()]
    torch.testing.assert_close(means[1], torch.stack(expected))


def test_padding_is_behind_the_last_event_and_zero():
    values = torch.arange(1.0, 7).reshape(3, 2)
    jagged = JaggedTensor(values, lengths=torch.tensor([0, 2, 1]))
    padded = pad_events(jagged, max_length=3)
    zero = [0.0, 0]
    assert padded.tolist() == [[zero] * 3, [[1, 2], [3, 4], zero], [[5, 6], zero, zero]]


def test_a_sample_longer_than_max_length_is_never_cut_silently():
    jagged = JaggedTensor(torch.ones(3, 2), lengths=torch.tensor([3]))
    with pytest.raises(RuntimeError, match="more events than its max_length"):
        pad_events(jagged, max_length=2)


def test_a_batch_without_any_event_gives_zeros(schema):
    jagged = JaggedTensor(torch.zeros(0, 8), lengths=torch.zeros(4, dtype=torch.int64))
    assert torch.equal(pad_events(jagged, 5), torch.zeros(4, 5, 8))
