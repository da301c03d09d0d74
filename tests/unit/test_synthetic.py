"""The synthetic source: a pure function of (seed, index), a calibrated oracle, and labels that need the sequence."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from dlrm_scale.config import SyntheticSource as SyntheticConfig
from dlrm_scale.data.synthetic import SyntheticSource
from dlrm_scale.training.metrics import auc, binary_metrics
from tests.support.configs import tiny_config

SCHEMA = tiny_config().features
ITEMS = SCHEMA.tables["item"].num_embeddings


def open_synthetic(
    schema=SCHEMA, split="train", seed=0, num_train=30_000, num_eval=5_000, skew=1.05
) -> SyntheticSource:
    return SyntheticSource(SyntheticConfig(num_train=num_train, num_eval=num_eval, id_skew=skew), schema, split, seed)


def blocks(source: SyntheticSource) -> list:
    return [source.read_block(b) for b in range(len(source.block_starts) - 1)]


@pytest.fixture(scope="module")
def train() -> list:
    return blocks(open_synthetic())


def digest(block) -> str:
    values = [block.dense_RF, block.labels_RT, *(j.values for j in block.ids.values())]
    return "".join(f"{float(v.sum(dtype=np.float64)):.10e}," for v in values)


def test_a_block_is_the_same_alone_again_and_in_another_process(train):
    assert digest(open_synthetic().read_block(5)) == digest(train[5])
    code = "from tests.unit.test_synthetic import *; print(digest(open_synthetic().read_block(5)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == digest(train[5])


def test_seed_and_split_change_the_samples(train):
    others = [open_synthetic(seed=1), open_synthetic(split="eval")]
    assert len({digest(train[0]), *(digest(o.read_block(0)) for o in others)}) == 3
    assert len({open_synthetic().fingerprint, *(o.fingerprint for o in others)}) == 3


def test_the_held_out_split_goes_on_where_training_ends():
    """Sample index i is the same whichever split it falls into."""
    longer = open_synthetic(num_train=4096 + 500)
    held_out = open_synthetic(num_train=4096, split="eval", num_eval=500)
    a, b = longer.read_block(1), held_out.read_block(0)
    assert np.array_equal(a.labels_RT, b.labels_RT) and np.array_equal(a.dense_RF, b.dense_RF)


def test_ids_are_in_range_aligned_and_skewed(train):
    category_of: dict[int, int] = {}
    lengths, items = [], []
    for block in train:
        for name, jagged in block.ids.items():
            rows = SCHEMA.tables[SCHEMA.table_of[name]].num_embeddings
            assert jagged.values.min() >= 0 and jagged.values.max() < rows
        item, category = block.ids["history_item"], block.ids["history_category"]
        assert np.array_equal(item.offsets, category.offsets)
        for i, c in zip(item.values, category.values, strict=True):
            assert category_of.setdefault(int(i), int(c)) == c, "an item has one category"
        for i, c in zip(block.ids["item"].values, block.ids["category"].values, strict=True):
            assert category_of.setdefault(int(i), int(c)) == c, "as a target too"
        lengths.append(item.lengths)
        items.append(item.values)
    lengths = np.concatenate(lengths)
    assert set(lengths) == set(range(7))
    counts = np.sort(np.bincount(np.concatenate(items), minlength=ITEMS))[::-1]
    assert counts[: ITEMS // 10].sum() > 0.4 * counts.sum(), "a tenth of the ids makes much of the traffic"


def test_hot_ids_do_not_lie_together():
    """Else a row-wise shard would get nearly all lookups."""
    values = np.concatenate([b.ids["user"].values for b in blocks(open_synthetic(skew=1.2))])
    halves = np.bincount(values * 2 // SCHEMA.tables["user"].num_embeddings, minlength=2) / len(values)
    assert abs(halves[0] - 0.5) < 0.2


def test_the_oracle_is_calibrated_and_beats_what_does_not_know_the_function(train):
    source = open_synthetic(num_eval=50_000, split="eval")
    p, y = source.oracle_probabilities_RT()[:, 0], np.concatenate([b.labels_RT for b in blocks(source)])[:, 0]
    assert np.array_equal(y, source.labels_RT()[:, 0])
    assert 0.15 < y.mean() < 0.4
    for decile in np.array_split(np.argsort(p), 10):
        error = np.sqrt((p[decile] * (1 - p[decile])).sum()) / len(decile)
        assert abs(p[decile].mean() - y[decile].mean()) < 4 * error
    best = binary_metrics(np.log(p / (1 - p)), y, np.ones(len(y)), None)
    assert 0.7 < best["auc"] < 0.95 and best["ne"] < 0.95


def test_the_label_depends_on_how_history_meets_target():
    source = open_synthetic(split="eval", num_eval=20_000)
    p, read = source.oracle_probabilities_RT()[:, 0], blocks(source)
    targets = np.concatenate([b.ids["category"].values for b in read])
    histories = [j.values[a:b] for j in (b.ids["history_category"] for b in read) for a, b in pairwise(j.offsets)]
    matching = np.array([(h == target).mean() if len(h) else 0.0 for h, target in zip(histories, targets, strict=True)])
    high, none = p[matching >= 0.5], p[matching == 0]
    assert len(high) > 200 and high.mean() > none.mean() + 0.1


VARIANTS = {
    "no dense": {"dense": []},
    "no sequences": {"sequences": []},
    "two labels and a weight": {"labels": ["click", "buy"], "weight": "importance"},
    "only a history": {
        "tables": {"item": {"num_embeddings": 300, "embedding_dim": 8}},
        "dense": [],
        "categorical": [],
        "sequences": [{"name": "h", "max_length": 4, "fields": [{"name": "hi", "table": "item"}]}],
    },
    "one table of one row": {
        "tables": {"one": {"num_embeddings": 1, "embedding_dim": 8}},
        "categorical": [{"name": "one", "table": "one"}],
        "sequences": [],
    },
}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_any_schema_is_generated_for(variant):
    schema = tiny_config(features=VARIANTS[variant], model={"mode": "sole"}).features
    source = open_synthetic(schema)
    block = source.read_block(1)
    assert block.labels_RT.shape == (4096, len(schema.labels)) and set(np.unique(block.labels_RT)) == {0.0, 1.0}
    assert block.dense_RF.shape == (4096, len(schema.dense)) and np.isfinite(block.dense_RF).all()
    assert set(block.ids) == {*schema.bag_keys, *schema.sequence_keys}
    if schema.weight:
        assert block.weights_R.min() >= 0.5 and block.weights_R.max() <= 1.5 and len(np.unique(block.weights_R)) > 1000
    p = source.oracle_probabilities_RT()[4096:8192]
    assert auc(p[:, 0], block.labels_RT[:, 0], np.ones(4096)) > 0.5
