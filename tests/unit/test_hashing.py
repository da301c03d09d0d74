"""The quick ways to the synthetic data's numbers against the plain ones, bit for bit."""

import numpy as np
import pytest

from dlrm_scale.data.hashing import by_chunks, hash64, modulo, normal, permutation, stream
from dlrm_scale.data.synthetic_labels import LabelFunction
from dlrm_scale.features import CategoricalFeature, FeatureSchema, Table

KEY = stream("a test")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64, np.int64])
@pytest.mark.parametrize("by", [1, 7, 16, 255])
def test_modulo_is_the_remainder(dtype, by):
    limits = np.iinfo(dtype)
    values = np.random.default_rng(0).integers(limits.min, limits.max, 1000, dtype, endpoint=True)
    values[:2] = limits.min, limits.max
    found = modulo(values, by)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values % by)


@pytest.mark.parametrize("num", [0, 5, 8192, 8193, 20_001])
def test_chunks_are_the_whole(num):
    counter, factor = np.arange(num), np.arange(num) * 0.5
    np.testing.assert_array_equal(
        by_chunks(lambda c, f: normal(KEY, c) * f, counter, factor), normal(KEY, counter) * factor
    )


@pytest.mark.parametrize("num", [0, 1, 70_001])
def test_a_permutation_is_the_stable_order_of_the_hashes(num):
    expected = np.argsort(hash64(KEY, np.arange(num)), kind="stable")
    np.testing.assert_array_equal(permutation(KEY, num), expected)


@pytest.mark.parametrize("num_embeddings", [1, 300, 65_536, 65_537, 1_000_000])
def test_effects_that_are_looked_up_equal_those_computed(num_embeddings):
    feature = CategoricalFeature(name="a", table="a")
    schema = FeatureSchema(tables={"a": Table(num_embeddings=num_embeddings, embedding_dim=4)}, categorical=(feature,))
    ranks = np.random.default_rng(0).integers(0, num_embeddings, 1237)
    ranks[0] = num_embeddings - 1
    expected = normal(stream(3, "effect", "id", "a", "click"), ranks) / np.sqrt(1 + ranks / 64)
    np.testing.assert_array_equal(LabelFunction(schema, 3)._id_effects(ranks, feature, "click"), expected)
