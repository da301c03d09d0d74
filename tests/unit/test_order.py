"""The order of samples and the data position, as properties over many shapes of data."""

import random

import numpy as np
import pytest

from dlrm_scale.data.loader import Reader
from dlrm_scale.data.order import Order
from dlrm_scale.errors import ConfigError
from tests.support.rows import BlockSource, numbers_of


def shapes() -> list[tuple]:
    """(block sizes, lanes, rows a lane reads at each step, shuffle_window_blocks, max_rows)"""
    edges = [
        ([1], 1, 1, 0, None),
        ([1], 4, 2, 2, None),  # fewer rows than lanes
        ([3], 8, 1, 0, None),
        ([2, 1], 4, 1, 1, None),
        ([8, 8], 4, 2, 1, None),  # everything divides
        ([9, 8], 4, 2, 3, None),  # one row too many
        ([5] * 6, 2, 100, 2, None),  # one step
        ([10, 10, 10], 4, 2, 2, 20),  # ends at a block's border
        ([10, 10, 10], 4, 2, 2, 11),
        ([10, 10, 10], 4, 2, 2, 1),
        ([10, 10, 10], 4, 2, 0, 1000),
    ]
    rng = random.Random(0)
    for _ in range(25):
        sizes = [rng.randint(1, 30) for _ in range(rng.randint(1, 12))]
        max_rows = rng.choice([None, rng.randint(1, sum(sizes))])
        edges.append((sizes, rng.choice([1, 2, 4, 6, 8]), rng.randint(1, 9), rng.randint(0, 4), max_rows))
    return edges


@pytest.fixture(params=shapes(), ids=str)
def order(request: pytest.FixtureRequest) -> Order:
    return make_order(*request.param)


def make_order(sizes: list[int], lanes: int, lane_batch: int, window: int, max_rows: int | None, **changes) -> Order:
    arguments = {"seed": 0, "fingerprint": "blocks"} | changes
    return Order(
        BlockSource(sizes, arguments["fingerprint"]),
        lanes=lanes,
        global_batch_size=lanes * lane_batch,
        shuffle_window_blocks=window,
        seed=arguments["seed"],
        max_rows=max_rows,
    )


def source_of(order: Order) -> BlockSource:
    """The order knows the source's blocks only as `max_rows` cuts them: the rest of the last one is put back."""
    sizes = order.block_rows.tolist()
    return BlockSource([*sizes[:-1], sizes[-1] + 3])


def read(order: Order, world_size: int = 1, epoch: int = 0, first_step: int = 0) -> list[list[list[int]]]:
    """For each step, for each rank, the numbers of the rows that it reads."""
    owned = order.lanes // world_size
    readers = [Reader(source_of(order), order, range(r * owned, (r + 1) * owned)) for r in range(world_size)]
    ranks = [[numbers_of(rows) for rows in reader.steps(epoch, first_step)] for reader in readers]
    return [list(step) for step in zip(*ranks, strict=True)]


def flat(steps: list[list[list[int]]]) -> list[int]:
    return [number for step in steps for numbers in step for number in numbers]


def test_an_epoch_holds_each_sample_once(order):
    for epoch in (0, 1):
        steps = read(order, epoch=epoch)
        assert len(steps) == order.steps_per_epoch
        assert sorted(flat(steps)) == list(range(order.num_rows))


def test_a_global_batch_holds_the_same_samples_at_any_world_size(order):
    alone = [step[0] for step in read(order)]
    for world_size in (n for n in range(2, order.lanes + 1) if order.lanes % n == 0):
        steps = read(order, world_size)
        assert [[number for numbers in step for number in numbers] for step in steps] == alone
        assert max(len(numbers) for step in steps for numbers in step) <= order.global_batch_size // world_size


@pytest.mark.parametrize("accumulate_steps", [2, 3])
def test_a_micro_batch_holds_the_same_samples_at_any_world_size(accumulate_steps):
    order = make_order([30, 7, 50], 4, 6, 2, None)
    micro_batches = []
    for world_size in (1, 2, 4):
        owned = order.lanes // world_size
        readers = [
            Reader(source_of(order), order, range(r * owned, (r + 1) * owned), accumulate_steps)
            for r in range(world_size)
        ]
        ranks = [[numbers_of(rows) for rows in reader.steps(0, first_step=1)] for reader in readers]
        micro_batches.append([[n for numbers in parts for n in numbers] for parts in zip(*ranks, strict=True)])
    assert micro_batches[0] == micro_batches[1] == micro_batches[2]
    assert len(micro_batches[0]) == (order.steps_per_epoch - 1) * accumulate_steps
    steps = [sorted(step[0]) for step in read(order, first_step=1)]
    k = accumulate_steps
    assert [
        sorted(n for part in micro_batches[0][s : s + k] for n in part) for s in range(0, len(micro_batches[0]), k)
    ] == steps


def test_lanes_tile_the_epoch_and_differ_by_one_row_at_most(order):
    lanes = [order.lane_range(lane) for lane in range(order.lanes)]
    assert [position for lane in lanes for position in lane] == list(range(order.num_rows))
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


def test_windows_tile_the_epoch(order):
    for window, end in zip(windows := order.windows(2), [*(w.start for w in windows[1:]), order.num_rows], strict=True):
        assert window.start + window.num_rows == end
        assert window.num_rows == order.block_rows[list(window.blocks)].sum()
        assert len(window.blocks) <= max(order.shuffle_window_blocks, 1)


def test_position_counts_what_was_read_and_leads_back_to_the_next_step(order):
    consumed, borders = 0, {}
    for epoch in range(3):
        for step, ranks in enumerate(read(order, epoch=epoch)):
            borders[consumed] = (epoch, step)
            consumed += len(ranks[0])
            assert order.consumed_after(epoch, step) == consumed
    borders[consumed] = (3, 0)
    for position in range(consumed + 1):
        if position in borders:
            assert order.locate(position) == borders[position]
        else:
            with pytest.raises(ConfigError, match=rf"^{position} samples .* train.global_batch_size"):
                order.locate(position)


def test_reading_from_a_step_on_is_the_tail_of_reading_all(order):
    whole = read(order, epoch=1)
    for first_step in {0, 1, order.steps_per_epoch // 2, order.steps_per_epoch}:
        assert read(order, epoch=1, first_step=first_step) == whole[first_step:]


def test_without_a_window_lanes_follow_the_file():
    order = make_order([7, 1, 12], 3, 2, 0, None)
    for epoch in (0, 1):
        for lane in range(3):
            reader = Reader(source_of(order), order, range(lane, lane + 1))
            assert [n for rows in reader.steps(epoch) for n in numbers_of(rows)] == list(order.lane_range(lane))


def test_order_depends_on_epoch_seed_and_data_and_on_nothing_else():
    shape = ([10] * 8, 4, 2, 3, None)
    orders = [
        flat(read(make_order(*shape))),
        flat(read(make_order(*shape), epoch=1)),
        flat(read(make_order(*shape, seed=1))),
        flat(read(make_order(*shape, fingerprint="others"))),
    ]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert flat(read(make_order(*shape))) == orders[0]
    assert flat(read(make_order(*shape), epoch=np.int64(1))) == orders[1]  # as a checkpoint may give it


def test_the_order_stays_from_release_to_release():
    """A run that is resumed by a newer version goes on in this order; a change here breaks it."""
    assert flat(read(make_order([4, 4, 4], 1, 2, 2, None))) == [2, 6, 1, 4, 5, 0, 3, 7, 9, 11, 8, 10]


def test_a_window_mixes_its_blocks_row_by_row():
    order = make_order([50] * 4, 1, 1, 2, None)
    first_window = flat(read(order))[:100]
    changes = np.count_nonzero(np.diff(np.array(first_window) // 50))
    assert 35 < changes < 65  # 49.5 expected, 5 standard deviation; 1 if the blocks stood one behind the other


@pytest.mark.parametrize("lanes, lane_batch", [(1, 7), (4, 3), (8, 5), (8, 40)])
def test_a_block_is_read_once_but_for_those_where_one_lane_meets_the_next(lanes, lane_batch):
    order = make_order([10] * 64, lanes, lane_batch, 2, None)
    source = source_of(order)
    reader = Reader(source, order, range(lanes))
    for _ in reader.steps(0):
        assert len(reader._open) <= lanes
    assert len(source.blocks_read) <= 64 + 2 * (lanes - 1)


def test_lanes_that_stand_in_one_window_read_it_once():
    """Small data: windows of 55 and 25 rows, lanes of 10; the sixth lane leaves the first window, five others stay in it."""
    order = make_order([5] * 16, 8, 2, 11, None)
    source = source_of(order)
    for _ in Reader(source, order, range(8)).steps(0):
        pass
    assert sorted(source.blocks_read) == list(range(16))


def test_two_epochs_of_one_reader_may_be_under_way_at_once():
    order = make_order([10] * 8, 2, 3, 2, None)
    reader = Reader(source_of(order), order, range(2))
    pairs = [
        (numbers_of(a), numbers_of(b)) for a, b in zip(reader.steps(0), reader.steps(1, first_step=0), strict=True)
    ]
    assert [a for a, _ in pairs] == [step[0] for step in read(order)]
    assert [b for _, b in pairs] == [step[0] for step in read(order, epoch=1)]
