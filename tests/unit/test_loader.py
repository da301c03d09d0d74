"""From rows to batches: against per-row loops, over ranks in threads, and ahead of time."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from dlrm_scale.data.batch import RecBatch
from dlrm_scale.data.loader import (
    Reader,
    StepAgreement,
    StepStatus,
    agree_alone,
    batches,
    concatenate,
    prefetch,
    take,
    to_batch,
)
from dlrm_scale.data.order import Order
from dlrm_scale.data.source import Rows
from dlrm_scale.errors import DataError, PeerError
from dlrm_scale.features import FeatureSchema
from tests.support.rows import SCHEMA, BlockSource, rows_of, sample, samples_of

DEADLINE = 5.0  # seconds that a thread is waited for before a test fails


def samples_of_batch(batch: RecBatch) -> list[dict]:
    """Each row of a batch as `sample` gives it, padding included."""
    ids = {key: jagged for kjt in (batch.bags, batch.sequences) for key, jagged in kjt.to_dict().items()}
    lists = {key: [part.tolist() for part in jagged.to_dense()] for key, jagged in ids.items()}
    return [
        {
            "dense": batch.dense_BF[b].tolist(),
            "ids": {key: lists[key][b] for key in lists},
            "labels": batch.labels_BT[b].tolist(),
            "weight": batch.weights_B[b].item(),
            "group": batch.groups_B[b].item(),
        }
        for b in range(batch.local_batch_size)
    ]


PADDING = {"dense": [0, 0], "ids": {name: [] for name in sample(0)["ids"]}, "labels": [0, 0], "weight": 0, "group": 0}


def numbers_of_batch(batch: RecBatch) -> list[int]:
    return [number for s in samples_of_batch(batch) for number in s["ids"]["row"]]


# ---- rows
@pytest.mark.parametrize("index", [[], [4], [0, 1, 2], [5, 0, 5, 3], list(range(6))[::-1]], ids=str)
def test_take_gives_the_rows_in_the_indexs_order(index):
    taken = take(rows_of([10, 11, 12, 20, 21, 22]), np.array(index, dtype=np.int64))
    assert samples_of(taken) == [sample([10, 11, 12, 20, 21, 22][i]) for i in index]
    assert samples_of(take(taken, np.arange(len(index)))) == samples_of(taken)


@pytest.mark.parametrize("parts", [[[1, 2]], [[1], [], [2, 3]], [[], []], [[5, 6, 7], [5, 6, 7]]], ids=str)
def test_concatenate_puts_parts_behind_one_another(parts):
    assert samples_of(concatenate([rows_of(p) for p in parts])) == [sample(n) for p in parts for n in p]


# ---- rows to batches
def test_a_batch_holds_its_rows_and_then_padding_without_weight_or_ids():
    batch = to_batch(rows_of([6, 3, 11]), SCHEMA, batch_size=5, mean_rank_weight=2.5)
    assert samples_of_batch(batch) == [sample(6), sample(3), sample(11), PADDING, PADDING]
    assert batch.bags.keys() == list(SCHEMA.bag_keys) and batch.sequences.keys() == list(SCHEMA.sequence_keys)
    assert batch.mean_rank_weight.item() == 2.5
    for floats in (batch.dense_BF, batch.labels_BT, batch.weights_B, batch.mean_rank_weight):
        assert floats.dtype == torch.float32
    assert batch.groups_B.dtype == batch.bags.values().dtype == torch.int64


def test_a_batch_may_hold_no_row_or_only_full_ones():
    assert samples_of_batch(to_batch(rows_of([]), SCHEMA, 2, 1.0)) == [PADDING, PADDING]
    assert samples_of_batch(to_batch(rows_of([4, 5]), SCHEMA, 2, 1.0)) == [sample(4), sample(5)]


def test_a_schema_without_sequences_has_no_sequence_kjt():
    tables = {name: SCHEMA.tables[name] for name in ("row", "tag")}
    schema = FeatureSchema(tables=tables, categorical=SCHEMA.categorical[:2])
    batch = to_batch(rows_of([1, 2]), schema, 2, 1.0)
    assert batch.sequences is None and batch.bags.keys() == ["row", "tags"]


def test_accumulation_splits_a_step_and_each_part_knows_the_weight_of_all():
    parts = [rows_of(numbers) for numbers in ([0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10], [])]
    micro = list(batches(iter(parts), SCHEMA, micro_batch_size=2, accumulate_steps=4, agree=agree_alone))
    assert [numbers_of_batch(b) for b in micro] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10], [], []]
    assert {b.local_batch_size for b in micro} == {2}
    for step, made in ((parts[:4], micro[:4]), (parts[4:], micro[4:])):
        total = sum(part.weights_R.sum() for part in step)
        assert [b.mean_rank_weight.item() for b in made] == pytest.approx([total] * 4)


def test_a_step_of_weight_zero_can_be_divided_by():
    rows = rows_of([1, 2])
    rows.weights_R[:] = 0
    (batch,) = batches(iter([rows]), SCHEMA, micro_batch_size=2, accumulate_steps=1, agree=agree_alone)
    assert batch.mean_rank_weight.item() == 1 and batch.weights_B.sum() == 0


def test_nothing_to_read_gives_no_batch():
    assert list(batches(iter([]), SCHEMA, micro_batch_size=2, accumulate_steps=1, agree=agree_alone)) == []


# ---- ranks
class Agreement:
    """What an all-reduce gives to ranks that are threads."""

    def __init__(self, num_ranks: int) -> None:
        self.statuses: list[StepStatus | None] = [None] * num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=DEADLINE)

    def of_rank(self, rank: int) -> Callable[[StepStatus], StepAgreement]:
        def agree(status: StepStatus) -> StepAgreement:
            self.statuses[rank] = status
            self.barrier.wait()
            weight = sum(s.weight_sum for s in self.statuses) / len(self.statuses)
            agreed = StepAgreement(
                weight,
                all(s.ended for s in self.statuses),
                any(s.failed for s in self.statuses),
                any(s.stop for s in self.statuses),
            )
            self.barrier.wait()
            return agreed

        return agree


def run_ranks(
    *steps_of_ranks: Iterator[Rows], micro_batch_size: int, accumulate_steps: int = 1
) -> list[tuple[list[RecBatch], Exception | None]]:
    """Each rank's batches, and what ended them if not their end."""
    agreement = Agreement(len(steps_of_ranks))

    def run(rank: int, steps: Iterator[Rows]) -> tuple[list[RecBatch], Exception | None]:
        made = []
        try:
            made.extend(
                batches(
                    steps,
                    SCHEMA,
                    micro_batch_size=micro_batch_size,
                    accumulate_steps=accumulate_steps,
                    agree=agreement.of_rank(rank),
                )
            )
        except Exception as e:
            return made, e
        return made, None

    with ThreadPoolExecutor(len(steps_of_ranks)) as pool:
        return list(pool.map(run, range(len(steps_of_ranks)), steps_of_ranks))


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_ranks_with_unequal_data_end_together_and_lose_nothing(accumulate_steps):
    def halves(*steps: list[int]) -> Iterator[Rows]:
        return iter([rows_of(step[i::accumulate_steps]) for step in steps for i in range(accumulate_steps)])

    results = run_ranks(
        halves([0, 1], [2, 3], [4]), halves([10]), iter([]), micro_batch_size=2, accumulate_steps=accumulate_steps
    )
    assert all(error is None for _, error in results)
    assert [len(made) for made, _ in results] == [3 * accumulate_steps] * 3
    read = [[n for batch in made for n in numbers_of_batch(batch)] for made, _ in results]
    assert read == [[0, 1, 2, 3, 4], [10], []]
    first = [[made[i].mean_rank_weight.item() for made, _ in results] for i in (0, accumulate_steps, -1)]
    sums = [sum(sample(n)["weight"] for n in step) for step in ([0, 1, 10], [2, 3], [4])]
    np.testing.assert_allclose(first, [[total / 3] * 3 for total in sums], rtol=1e-6)


def test_a_rank_that_cannot_read_raises_its_own_error_and_the_others_hear_of_it():
    def broken() -> Iterator[Rows]:
        yield rows_of([0, 1])
        raise DataError("part_3.parquet, row 17: item is -1")

    results = run_ranks(iter([rows_of([2, 3])] * 5), broken(), iter([rows_of([4])]), micro_batch_size=2)
    assert [len(made) for made, _ in results] == [1, 1, 1]
    assert [type(error) for _, error in results] == [PeerError, DataError, PeerError]
    assert str(results[1][1]) == "part_3.parquet, row 17: item is -1"


def test_ranks_end_before_the_step_at_which_one_is_asked_to_stop():
    agreement, made = Agreement(2), [[], []]

    def run(rank: int) -> None:
        def agree(status: StepStatus) -> StepAgreement:
            asked = rank == 1 and len(made[1]) == 2
            return agreement.of_rank(rank)(replace(status, stop=asked))

        steps = iter([rows_of([i]) for i in range(9)])
        for batch in batches(steps, SCHEMA, micro_batch_size=1, accumulate_steps=1, agree=agree):
            made[rank] += numbers_of_batch(batch)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert made == [[0, 1], [0, 1]]


def test_ranks_that_all_fail_each_raise_their_own_error():
    def broken(name: str) -> Iterator[Rows]:
        raise DataError(name)
        yield

    errors = [error for _, error in run_ranks(broken("a"), broken("b"), micro_batch_size=2)]
    assert [(type(e), str(e)) for e in errors] == [(DataError, "a"), (DataError, "b")]


@pytest.mark.parametrize("block_sizes", [[1], [3], [7, 2, 8], [64], [65]], ids=str)
def test_ranks_that_share_an_epoch_train_on_each_sample_once(block_sizes):
    source = BlockSource(block_sizes)
    order = Order(source, lanes=4, global_batch_size=8, shuffle_window_blocks=2, seed=0)
    steps = [Reader(source, order, range(2 * r, 2 * r + 2)).steps(0) for r in range(2)]
    results = run_ranks(*steps, micro_batch_size=4)
    assert [len(made) for made, _ in results] == [order.steps_per_epoch] * 2
    seen = [s for made, _ in results for batch in made for s in samples_of_batch(batch) if s["weight"] > 0]
    assert sorted(seen, key=lambda s: s["ids"]["row"]) == [sample(n) for n in range(sum(block_sizes))]


# ---- prefetch
def wait_until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + DEADLINE
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def readers_alive() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 2, 200])
def test_prefetch_keeps_order_and_ends(depth):
    with prefetch(iter(range(100)), depth) as stream:
        assert list(stream) == list(range(100))
        assert next(stream, "ended") == "ended"
    assert readers_alive() == 0


def test_prefetch_raises_what_the_reader_raised_where_it_raised():
    def items() -> Iterator[int]:
        yield from (0, 1)
        raise DataError("part_0.parquet, row 3: price is NaN")

    taken = []
    with pytest.raises(DataError, match=r"^part_0.parquet, row 3: price is NaN$"), prefetch(items(), 4) as stream:
        for item in stream:
            taken.append(item)
    assert taken == [0, 1]
    assert readers_alive() == 0


@pytest.mark.parametrize("depth", [1, 3])
def test_a_reader_is_ahead_of_a_slow_consumer_by_the_depth_and_no_more(depth):
    produced = []

    def items() -> Iterator[int]:
        for i in range(1000):
            produced.append(i)
            yield i

    with prefetch(items(), depth) as stream:
        for taken in range(4):
            assert wait_until(lambda expected=taken + depth: len(produced) >= expected)
            time.sleep(0.03)  # time to run too far ahead
            assert len(produced) == taken + depth
            next(stream)


@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_leaving_early_ends_the_reader(num_taken):
    def endless() -> Iterator[int]:
        i = 0
        while True:
            yield (i := i + 1)

    start = time.monotonic()
    with prefetch(endless(), 3) as stream:
        for _ in range(num_taken):
            next(stream)
    assert readers_alive() == 0
    assert time.monotonic() - start < DEADLINE / 2


def test_a_consumers_own_error_ends_the_reader_and_stays_its_own():
    with pytest.raises(ZeroDivisionError), prefetch(iter(range(1000)), 2) as stream:
        next(stream)
        raise ZeroDivisionError
    assert readers_alive() == 0
