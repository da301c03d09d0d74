"""The embedded data: the same wherever it is made, within its schema, and labelled by the function that it knows."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlrm_scale import config as configuration
from dlrm_scale.config_io import load_config
from dlrm_scale.data.loader import concatenate, take
from dlrm_scale.data.source import Jagged, Rows
from dlrm_scale.data.synthetic import SyntheticSource, power_law_ranks
from dlrm_scale.features import CategoricalFeature, DenseFeature, FeatureSchema, Sequence, SequenceField, Table
from dlrm_scale.training.metrics import auc
from tests.support.configs import tiny_config
from tests.support.rows import content

ROOT = Path(__file__).parents[2]
TINY = tiny_config().features
QUICKSTART = load_config(ROOT / "configs" / "quickstart.yaml").features


def source(
    schema: FeatureSchema = TINY, split: str = "train", seed: int = 0, num_train: int = 9000, num_eval: int = 5000
) -> SyntheticSource:
    return SyntheticSource(configuration.SyntheticSource(num_train=num_train, num_eval=num_eval), schema, split, seed)


def read_all(of: SyntheticSource) -> Rows:
    return concatenate([of.read_block(b) for b in range(len(of.block_starts) - 1)])


def categorical(name: str, **changes: object) -> CategoricalFeature:
    return CategoricalFeature(name=name, table=name, **changes)


def tables(**num_embeddings: int) -> dict[str, Table]:
    return {name: Table(num_embeddings=num, embedding_dim=4) for name, num in num_embeddings.items()}


def history(*fields: str, max_length: int = 6, name: str = "history") -> Sequence:
    """One field a table."""
    return Sequence(
        name=name,
        max_length=max_length,
        fields=tuple(SequenceField(name=f"{name}_{table}", table=table) for table in fields),
    )


SCHEMAS = {
    "quickstart": QUICKSTART,
    "tiny, with multi-hot": TINY,
    "dense only beside one id": FeatureSchema(
        tables=tables(user=50), dense=(DenseFeature(name="x"),), categorical=(categorical("user"),)
    ),
    "no dense, no sequences": FeatureSchema(
        tables=tables(a=1000, b=7, c=1),
        categorical=(
            categorical("a"),
            categorical("b"),
            categorical("c"),
        ),
    ),
    "often no id": FeatureSchema(tables=tables(a=1000), categorical=(categorical("a", pooling_factor=0.3),)),
    "multi-hot only": FeatureSchema(
        tables=tables(tags=300), categorical=(categorical("tags", multi_hot=True, pooling_factor=1.7),)
    ),
    "one sequence, its target and no user": FeatureSchema(
        tables=tables(item=400), categorical=(categorical("item"),), sequences=(history("item"),)
    ),
    "sequence without target": FeatureSchema(tables=tables(item=3), sequences=(history("item", max_length=1),)),
    "two sequences of one table, a large last table": FeatureSchema(
        tables=tables(user=100, item=500, shop=5000),
        categorical=(
            categorical("user"),
            categorical("shop"),
            categorical("item"),
        ),
        sequences=(
            history("item", "shop", name="views"),
            history("item", max_length=3, name="buys"),
        ),
    ),
    "tasks, weight, group": FeatureSchema(
        tables=tables(user=100), categorical=(categorical("user"),), labels=("a", "b", "c"), weight="w", group="user"
    ),
}


@pytest.fixture(params=SCHEMAS.values(), ids=SCHEMAS.keys())
def schema(request: pytest.FixtureRequest) -> FeatureSchema:
    return request.param


# ---- a pure function of (seed, index)
def test_a_block_read_alone_is_its_slice_of_all_blocks():
    whole, starts = read_all(source()), source().block_starts
    assert len(starts) == 4 and starts[-1] == 9000
    for block in (2, 0, 1):
        expected = take(whole, np.arange(starts[block], starts[block + 1]))
        assert content(source().read_block(block)) == content(expected)


OTHER_PROCESS = """
from dlrm_scale.data.synthetic import SyntheticSource
from dlrm_scale.training.metrics import auc
from tests.support.configs import tiny_config
from tests.support.rows import content
config = tiny_config(data={"source": {"kind": "synthetic", "num_train": 9000, "num_eval": 5000}})
print(content(SyntheticSource(config.data.source, config.features, "train", 3).read_block(1)))
"""


def test_another_process_makes_the_same_data():
    other = subprocess.run([sys.executable, "-c", OTHER_PROCESS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.split() == [content(source(seed=3).read_block(1))]


def test_evaluation_is_what_would_follow_training():
    longer = read_all(source(num_train=14000))
    assert content(take(longer, np.arange(9000))) == content(read_all(source()))
    assert content(take(longer, np.arange(9000, 14000))) == content(read_all(source(split="eval")))


def test_the_seed_changes_all():
    one, other = source().read_block(0), source(seed=1).read_block(0)
    assert not np.array_equal(one.dense_RF, other.dense_RF)
    assert not np.array_equal(one.labels_RT, other.labels_RT)
    for name in one.ids:
        assert not np.array_equal(one.ids[name].values, other.ids[name].values), name


def test_the_fingerprint_tells_data_apart():
    changed = [source(), source(seed=1), source(split="eval"), source(num_train=9001), source(QUICKSTART)]
    assert len({s.fingerprint for s in changed}) == len(changed)
    assert source().fingerprint == changed[0].fingerprint


# ---- within the schema
def test_rows_fit_the_schema(schema):
    rows, num_rows = read_all(source(schema)), 9000
    assert rows.dense_RF.shape == (num_rows, len(schema.dense)) and rows.dense_RF.dtype == np.float32
    assert np.isfinite(rows.dense_RF).all()
    assert rows.labels_RT.shape == (num_rows, len(schema.labels)) and set(np.unique(rows.labels_RT)) == {0, 1}
    assert (
        (rows.weights_R.min() >= 0.5 and rows.weights_R.std() > 0.2) if schema.weight else (rows.weights_R == 1).all()
    )
    assert len(np.unique(rows.groups_R)) > 10 if schema.group else (rows.groups_R == 0).all()
    assert list(rows.ids) == [*schema.bag_keys, *schema.sequence_keys]
    for name, ids in rows.ids.items():
        assert ids.values.dtype == ids.offsets.dtype == np.int64
        assert len(ids.offsets) == num_rows + 1 and ids.offsets[0] == 0 and ids.offsets[-1] == len(ids.values)
        assert 0 <= ids.values.min() and ids.values.max() < schema.tables[schema.table_of[name]].num_embeddings


def test_lengths_are_as_the_schema_says(schema):
    ids = read_all(source(schema)).ids
    for sequence in schema.sequences:
        first, *others = (ids[field.name] for field in sequence.fields)
        assert first.lengths.min() == 0 and first.lengths.max() == sequence.max_length
        for other in others:
            np.testing.assert_array_equal(first.offsets, other.offsets)
    for feature in schema.categorical:
        lengths = ids[feature.name].lengths
        assert lengths.max() <= 1 or feature.multi_hot
        assert lengths.mean() == pytest.approx(feature.pooling_factor, rel=0.05)


def test_mean_sequence_length_is_the_schemas_pooling_factor():
    lengths = read_all(source(QUICKSTART)).ids["history_item"].lengths
    assert lengths.mean() == pytest.approx(11, rel=0.05)


@pytest.mark.parametrize(
    "name, first, second",
    [
        ("quickstart", "history_item", "history_category"),
        ("two sequences of one table, a large last table", "views_item", "views_shop"),
    ],
)
def test_a_second_field_is_a_function_of_the_first_in_events_and_target(name, first, second):
    schema = SCHEMAS[name]
    ids = read_all(source(schema)).ids
    second_of: dict[int, set[int]] = {}
    for one, other in (first, second), (schema.table_of[first], schema.table_of[second]):
        for a, b in zip(ids[one].values.tolist(), ids[other].values.tolist(), strict=True):
            second_of.setdefault(a, set()).add(b)
    assert {len(seconds) for seconds in second_of.values()} == {1}
    assert len(set.union(*second_of.values())) > 50


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.0, 1.05, 3.0])
def test_ranks_follow_the_power_law(skew):
    num, samples = 40, 200_000
    ranks = power_law_ranks((np.arange(samples) + 0.5) / samples, num, skew)
    edges = np.arange(1.0, num + 2)
    mass = np.diff(np.log(edges) if skew == 1 else edges ** (1 - skew) / (1 - skew))
    np.testing.assert_allclose(np.bincount(ranks, minlength=num) / samples, mass / mass.sum(), atol=2 / samples)


@pytest.mark.parametrize("skew", [0.0, 0.999999, 1.0, 1.05, 5.0])
@pytest.mark.parametrize("num", [1, 2, 3_000_000_000])
def test_ranks_stay_in_the_table_up_to_the_open_end(num, skew):
    ranks = power_law_ranks(np.array([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]), num, skew)
    assert ranks[0] == 0 and (np.diff(ranks) >= 0).all() and ranks[-1] < num


def test_hot_ids_are_spread_over_the_table():
    """No row-wise shard of eight gets much more than an eighth of the lookups of the 64 hottest ids."""
    ids = read_all(source(QUICKSTART)).ids["publisher"].values
    values, counts = np.unique(ids, return_counts=True)
    hottest = values[np.argsort(-counts)[:64]]
    assert counts.max() > 20 * counts.mean()
    assert np.bincount(hottest * 8 // 5000, minlength=8).max() <= 12


# ---- labels
def assert_calibrated(probabilities_N: np.ndarray, labels_N: np.ndarray) -> None:
    """Mean label within 3 standard errors of the mean probability; within 4 in each decile, as there are ten."""
    by_probability = np.argsort(probabilities_N)
    assert abs(standard_errors_off(probabilities_N, labels_N)) < 3
    for part in np.array_split(by_probability, 10):
        assert abs(standard_errors_off(probabilities_N[part], labels_N[part])) < 4


def standard_errors_off(probabilities_N: np.ndarray, labels_N: np.ndarray) -> float:
    return (labels_N - probabilities_N).sum() / np.sqrt((probabilities_N * (1 - probabilities_N)).sum())


@pytest.fixture(scope="module")
def quickstart() -> tuple[SyntheticSource, np.ndarray, np.ndarray]:
    """50k held-out samples: the source, the oracle's probabilities and the labels of its only task."""
    of = source(QUICKSTART, split="eval", num_eval=50_000)
    return of, of.oracle_probabilities_RT()[:, 0], of.labels_RT()[:, 0]


def test_the_oracle_is_calibrated(quickstart):
    assert_calibrated(*quickstart[1:])


def test_the_oracle_speaks_of_the_rows_that_are_read(schema):
    of = source(schema)
    np.testing.assert_array_equal(of.labels_RT(), read_all(of).labels_RT)
    probabilities_RT = of.oracle_probabilities_RT()
    assert probabilities_RT.shape == of.labels_RT().shape
    for task, name in enumerate(schema.labels):
        assert_calibrated(probabilities_RT[:, task], of.labels_RT()[:, task])
        assert 0.15 < probabilities_RT[:, task].mean() < 0.4, name


def test_tasks_have_labels_of_their_own():
    labels_RT = source(SCHEMAS["tasks, weight, group"]).labels_RT()
    correlations = np.corrcoef(labels_RT.T)
    assert np.abs(correlations - np.eye(3)).max() < 0.3


def test_labels_depend_on_whose_history_it_is(quickstart):
    of, probabilities_N, labels_N = quickstart
    draws = [of._draw(of._index_of(block)) for block in range(len(of.block_starts) - 1)]
    shuffled = [of._labels.probabilities_RT(with_histories_of_others(draw))[:, 0] for draw in draws]
    same_weight = np.ones(len(labels_N))
    best = auc(probabilities_N, labels_N, same_weight)
    assert 0.75 < best < 0.9
    assert auc(np.concatenate(shuffled), labels_N, same_weight) < best - 0.05


def with_histories_of_others(draw):
    num_rows = len(draw.user_R)
    others = np.roll(np.arange(num_rows), 1)
    ranks = dict(draw.ranks)
    for name in ("history_item", "history_category"):
        parts = np.split(ranks[name].values, ranks[name].offsets[1:-1])
        lengths = ranks[name].lengths[others]
        ranks[name] = Jagged(np.concatenate([parts[r] for r in others]), np.concatenate([[0], np.cumsum(lengths)]))
    return dataclasses.replace(draw, ranks=ranks)
