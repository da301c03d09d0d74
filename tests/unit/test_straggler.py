"""Which rank is slow, and by how much."""

import time

import pytest
import torch

from dlrm_scale.resilience.straggler import OwnTime, Streak, slowest


@pytest.mark.parametrize(
    ("ms_by_rank", "expected"),
    [([2.0, 6.0], (1, 3.0)), ([4.0, 1.0, 2.0, 3.0], (0, 2.0)), ([1.0, 1.0], (0, 1.0)), ([0.0, 0.0], (0, 1.0))],
)
def test_the_slowest_rank_is_measured_by_the_others_median(ms_by_rank, expected):
    assert slowest(ms_by_rank) == expected


def test_own_time_is_the_mean_span_since_the_last_drain():
    own, began, between = OwnTime(torch.device("cpu")), time.perf_counter(), 0.0
    for seconds in (0.01, 0.03):
        own.start()
        time.sleep(seconds)
        own.stop()
        stopped = time.perf_counter()
        time.sleep(0.05)  # nobody's
        between += time.perf_counter() - stopped
    all_but_between_ms = (time.perf_counter() - began - between) * 1e3
    assert 20 <= own.drain() <= all_but_between_ms / 2
    assert own.drain() == 0.0


def test_a_streak_is_of_one_rank_that_stays_slow():
    streak = Streak(ratio=2.0)
    seen = [(1, 3.0), (1, 2.5), (1, 2.0), (1, 4.0), (0, 4.0), (0, 4.0), (0, 4.0)]
    assert [streak.add(rank, ratio) for rank, ratio in seen] == [1, 2, 0, 1, 1, 2, 3]
