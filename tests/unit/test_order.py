"""The order of samples: each once an epoch, the same global batches at every world size, and a position that tells where one is."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain

import numpy as np
import pytest

from dlrm_scale.data.loader import Reader
from dlrm_scale.data.order import Order
from dlrm_scale.data.source import Jagged, Rows
from dlrm_scale.errors import ConfigError

LAYOUTS = [[1], [5], [7, 1, 3], [4, 4, 4, 4], [10, 30, 2, 2, 50, 6], [3] * 41]
SETTINGS = [  # lanes, global batch, shuffle window
    (1, 4, 0),
    (4, 8, 1),
    (4, 4, 3),
    (8, 16, 2),
    (4, 64, 100),
]


class Numbers:
    """A source whose row i holds the id i: in blocks of the given sizes."""

    def __init__(self, block_rows: list[int], fingerprint: str = "numbers") -> None:
        self.fingerprint = fingerprint
        self.block_starts = np.concatenate(([0], np.cumsum(block_rows)))
        self.mended: dict[str, int] = {}
        self.num_reads: Counter[int] = Counter()

    def read_block(self, block: int) -> Rows:
        self.num_reads[block] += 1
        ids = np.arange(self.block_starts[block], self.block_starts[block + 1])
        num = len(ids)
        return Rows(
            dense_RF=np.zeros((num, 0), np.float32),
            ids={"id": Jagged(ids, np.arange(num + 1))},
            labels_RT=np.zeros((num, 1), np.float32),
            weights_R=np.ones(num, np.float32),
            groups_R=ids,
        )


def make_order(source, lanes, batch, window, seed=0, max_rows=None) -> Order:
    return Order(
        source, lanes=lanes, global_batch_size=batch, shuffle_window_blocks=window, seed=seed, max_rows=max_rows
    )


def steps_of(source, order, world, rank, epoch=0, first_step=0) -> list[list[int]]:
    own = order.lanes // world
    reader = Reader(source, order, range(rank * own, (rank + 1) * own))
    return [rows.groups_R.tolist() for rows in reader.steps(epoch, first_step)]


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("lanes", "batch", "window"), SETTINGS)
@pytest.mark.parametrize("max_rows", [None, 6])
def test_every_world_size_sees_the_same_global_batches_and_each_sample_once(layout, lanes, batch, window, max_rows):
    source = Numbers(layout)
    order = make_order(source, lanes, batch, window, max_rows=max_rows)
    num_rows = min(sum(layout), max_rows or sum(layout))
    batches_by_world = []
    for world in (w for w in (1, 2, 4) if lanes % w == 0):
        ranks = [steps_of(source, order, world, rank) for rank in range(world)]
        assert {len(steps) for steps in ranks} == {order.steps_per_epoch}
        assert all(len(rows) <= batch // world for steps in ranks for rows in steps)
        batches_by_world.append([joined(steps[s] for steps in ranks) for s in range(order.steps_per_epoch)])
    assert all(batches == batches_by_world[0] for batches in batches_by_world)
    assert sorted(joined(batches_by_world[0])) == list(range(num_rows))
    consumed = 0
    for step, rows in enumerate(batches_by_world[0]):
        assert order.locate(consumed) == (0, step)
        consumed += len(rows)
        assert order.consumed_after(0, step) == consumed
    assert order.locate(consumed) == (1, 0)


@pytest.mark.parametrize("first_step", [0, 1, 3])
def test_a_reader_that_starts_later_reads_the_rest(first_step):
    source = Numbers([10, 30, 2, 2, 50, 6])
    order = make_order(source, 4, 16, 2)
    assert (
        steps_of(source, order, 2, 1, epoch=3, first_step=first_step)
        == steps_of(source, order, 2, 1, epoch=3)[first_step:]
    )


def test_order_depends_on_seed_epoch_and_data_and_on_nothing_else():
    def flat(fingerprint="numbers", seed=0, epoch=0, window=3):
        source = Numbers([20] * 6, fingerprint)
        return joined(steps_of(source, make_order(source, 2, 8, window, seed), 1, 0, epoch))

    assert flat() == flat()
    different = [flat(), flat(seed=1), flat(epoch=1), flat(fingerprint="others")]
    assert len({tuple(order) for order in different}) == 4


def test_rows_are_mixed_within_windows_of_blocks():
    source = Numbers([100] * 10)
    order = make_order(source, 1, 100, 5)
    windows = [{row // 100 for row in rows} for rows in steps_of(source, order, 1, 0)]
    assert len(set.union(*windows[:5])) == 5 and set.union(*windows[:5]).isdisjoint(set.union(*windows[5:]))
    assert all(len(blocks) >= 4 for blocks in windows)


def test_without_shuffling_lanes_read_the_files_in_order():
    source = Numbers([7, 5, 8])
    assert joined(steps_of(source, make_order(source, 1, 4, 0), 1, 0)) == list(range(20))
    assert steps_of(source, make_order(source, 2, 4, 0), 1, 0)[0] == [0, 1, 10, 11]


def test_each_window_is_decoded_about_once_a_lane():
    source = Numbers([50] * 16)
    order = make_order(source, 4, 40, 4)
    steps_of(source, order, 1, 0)
    assert sum(source.num_reads.values()) <= 16 + 4 * 4  # a window at a lane's border may be read by both


def test_a_position_inside_a_step_is_refused():
    order = make_order(Numbers([100]), 4, 16, 0)
    assert order.locate(32) == (0, 2) and order.locate(100 + 16) == (1, 1)
    with pytest.raises(ConfigError, match=r"40 samples.*global_batch_size \(16\)"):
        order.locate(40)


def test_lanes_differ_by_at_most_one_row():
    order = make_order(Numbers([101]), 8, 8, 0)
    lengths = [len(order.lane_range(lane)) for lane in range(8)]
    assert sum(lengths) == 101 and max(lengths) - min(lengths) <= 1
