"""From rows to batches: padding, micro-batches, weights, agreement between ranks, and reading ahead."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from dlrm_scale.data.loader import StepAgreement, StepStatus, agree_alone, batches, concatenate, prefetch, take
from dlrm_scale.data.open import open_source
from dlrm_scale.data.source import Jagged, Rows
from dlrm_scale.errors import DataError, PeerError
from tests.support.configs import tiny_config

CONFIG = tiny_config(features={"weight": "importance"})
SCHEMA = CONFIG.features


@pytest.fixture(scope="module")
def rows() -> Rows:
    return open_source(CONFIG.data, SCHEMA, "train", 0).read_block(0)


def ids_by_row(jagged: Jagged) -> list[list[int]]:
    return [jagged.values[a:b].tolist() for a, b in zip(jagged.offsets[:-1], jagged.offsets[1:], strict=True)]


def test_take_and_concatenate_work_on_slices(rows):
    index = np.array([7, 3, 3, 40, 0])
    sliced = Rows(
        dense_RF=rows.dense_RF[5:],
        ids={name: Jagged(j.values, j.offsets[5:]) for name, j in rows.ids.items()},  # offsets do not begin at 0
        labels_RT=rows.labels_RT[5:],
        weights_R=rows.weights_R[5:],
        groups_R=rows.groups_R[5:],
    )
    both = concatenate([take(rows, index), take(sliced, index), sliced])
    wanted = [*index, *(index + 5), *range(5, rows.num_rows)]
    for name, jagged in both.ids.items():
        original = ids_by_row(rows.ids[name])
        assert ids_by_row(jagged) == [original[i] for i in wanted], name
    for column in ("dense_RF", "labels_RT", "weights_R", "groups_R"):
        assert np.array_equal(getattr(both, column), getattr(rows, column)[wanted])


@pytest.mark.parametrize("num_rows", [0, 3, 8, 21, 24])
@pytest.mark.parametrize("accumulate_steps", [1, 3])
def test_batches_hold_the_rows_then_padding(rows, num_rows, accumulate_steps):
    step = take(rows, np.arange(num_rows))
    made = list(
        batches(iter([step]), SCHEMA, local_batch_size=24, accumulate_steps=accumulate_steps, agree=agree_alone)
    )
    assert [b.local_batch_size for b in made] == [24 // accumulate_steps] * accumulate_steps
    for column, name in (
        ("dense_BF", "dense_RF"),
        ("labels_BT", "labels_RT"),
        ("weights_B", "weights_R"),
        ("groups_B", "groups_R"),
    ):
        whole = torch.cat([getattr(b, column) for b in made]).numpy()
        assert np.array_equal(whole[:num_rows], getattr(step, name)), column
        assert not whole[num_rows:].any(), column
    for collection, keys in (("bags", SCHEMA.bag_keys), ("sequences", SCHEMA.sequence_keys)):
        for key in keys:
            found = []
            for batch in made:
                kjt = getattr(batch, collection)
                assert kjt.keys() == list(keys)
                found += [v.tolist() for v in kjt[key].to_dense()]
            assert found == ids_by_row(step.ids[key]) + [[]] * (24 - num_rows), key
    total = step.weights_R.sum(dtype=np.float64) or 1.0
    assert all(b.mean_rank_weight.item() == pytest.approx(total) for b in made), "of the whole step"


def test_a_schema_without_a_collection_gives_none(rows):
    schema = tiny_config(
        features={
            "tables": {"user": {"num_embeddings": 500, "embedding_dim": 8}},
            "categorical": [{"name": "user", "table": "user"}],
            "sequences": [],
        },
        model={"mode": "sole"},
    ).features
    (batch,) = batches(
        iter([take(rows, np.arange(4))]), schema, local_batch_size=4, accumulate_steps=1, agree=agree_alone
    )
    assert batch.sequences is None and batch.bags.keys() == ["user"]


class TwoRanks:
    """An agreement between two threads, as training's all-reduce is between processes."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.given: list[StepStatus | None] = [None, None]

    def of(self, rank: int) -> Callable[[StepStatus], StepAgreement]:
        def agree(status: StepStatus) -> StepAgreement:
            self.given[rank] = status
            self.barrier.wait()
            statuses = list(self.given)
            self.barrier.wait()
            return StepAgreement(
                mean_rank_weight=sum(s.weight_sum for s in statuses) / 2,
                all_ended=all(s.ended for s in statuses),
                any_failed=any(s.failed for s in statuses),
            )

        return agree

    def run(self, iterators: list[Iterator[Rows]]) -> list:
        """Per rank: its batches, or what it raised."""
        results: list = [None, None]

        def work(rank: int) -> None:
            stream = batches(iterators[rank], SCHEMA, local_batch_size=8, accumulate_steps=1, agree=self.of(rank))
            try:
                results[rank] = list(stream)
            except DataError as e:
                results[rank] = e

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_a_rank_that_ends_first_goes_on_with_weight_zero(rows):
    def steps(num):
        return iter([take(rows, np.arange(8 * s, 8 * s + 8)) for s in range(num)])

    long, short = TwoRanks().run([steps(4), steps(1)])
    assert len(long) == len(short) == 4
    assert all((b.weights_B > 0).all() for b in long) and not any(b.weights_B.any() for b in short[1:])
    for mine, other in zip(long, short, strict=True):
        total = (mine.weights_B.double().sum() + other.weights_B.double().sum()).item()
        assert mine.mean_rank_weight == other.mean_rank_weight == pytest.approx(total / 2)


def test_a_rank_with_no_row_at_all_still_takes_part(rows):
    full, empty = TwoRanks().run([iter([take(rows, np.arange(8))]), iter([])])
    assert len(full) == len(empty) == 1 and empty[0].local_batch_size == 8
    assert empty[0].bags.keys() == list(SCHEMA.bag_keys) and len(empty[0].sequences.values()) == 0


def test_a_failure_reaches_the_other_rank(rows):
    def failing():
        yield take(rows, np.arange(8))
        raise DataError("row 9 is bad")

    good, bad = TwoRanks().run([iter([take(rows, np.arange(8))] * 3), failing()])
    assert isinstance(good, PeerError) and type(bad) is DataError and "row 9" in str(bad)


def reading_ahead(ready: list[int], num: int) -> Iterator[int]:
    for i in range(num):
        ready.append(i)
        yield i


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_prefetch_keeps_order_and_raises_in_place():
    def failing():
        yield from range(5)
        raise DataError("at five")

    seen = []
    with pytest.raises(DataError, match="at five"), prefetch(failing(), 2) as stream:
        for item in stream:
            seen.append(item)
    assert seen == list(range(5)) and not prefetch_threads()


def test_prefetch_reads_ahead_but_not_further_than_its_depth():
    ready: list[int] = []
    with prefetch(reading_ahead(ready, 100), 3) as stream:
        assert next(stream) == 0
        deadline = time.monotonic() + 5
        while len(ready) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(ready) == 5  # one consumed, three waiting, one in the reader's hand


def test_leaving_early_ends_the_reader():
    ready: list[int] = []
    with prefetch(reading_ahead(ready, 10_000), 2) as stream:
        assert next(stream) == 0
    assert not prefetch_threads() and len(ready) < 10
