"""The step clock on a CPU, with a time that moves only when the test says so."""

from types import SimpleNamespace

import pytest
import torch

from dlrm_scale.training.clock import STAGES, StepClock


class Time:
    def __init__(self) -> None:
        self.now_ms = 1000.0

    def perf_counter(self) -> float:
        return self.now_ms / 1e3


@pytest.fixture
def time(monkeypatch) -> Time:
    time = Time()
    monkeypatch.setattr("dlrm_scale.training.clock.time", SimpleNamespace(perf_counter=time.perf_counter))
    return time


@pytest.fixture
def clock(time) -> StepClock:
    return StepClock(torch.device("cpu"))


def slow_batches(time: Time, *waits_ms: float):
    for wait_ms in waits_ms:
        time.now_ms += wait_ms
        yield object()


def micro_batch(clock: StepClock, time: Time, batches, **stages_ms: float) -> None:
    """Takes a batch, then lets each stage last its milliseconds; the batch is waited for within input_dist."""
    next(batches)
    for stage, ms in stages_ms.items():
        time.now_ms += ms
        clock.end(stage)


def step_of(ms: dict[str, float]):
    return pytest.approx(dict.fromkeys((*STAGES, "step"), 0.0) | ms, abs=1e-6)


def test_stages_add_up_to_the_step_and_the_wait_for_data_is_in_one_only(clock, time):
    batches = clock.timed(slow_batches(time, 20))
    clock.begin()
    micro_batch(clock, time, batches, input_dist=3, embedding_forward=5, dense_backward=7, optimizer=2)
    clock.finish()
    [ms] = clock.drain()
    assert ms == step_of(
        {
            "data_wait": 20,
            "input_dist": 3,
            "embedding_forward": 5,
            "dense_backward": 7,
            "optimizer": 2,
            "step": 20 + 3 + 5 + 7 + 2,
        }
    )
    assert sum(ms[stage] for stage in STAGES) == pytest.approx(ms["step"])


def test_micro_batches_of_a_step_add_up(clock, time):
    batches = clock.timed(slow_batches(time, 20, 40))
    clock.begin()
    micro_batch(clock, time, batches, input_dist=3, embedding_forward=5, dense_backward=7, optimizer=0)
    micro_batch(clock, time, batches, input_dist=4, embedding_forward=6, dense_backward=8, optimizer=2)
    clock.finish()
    assert clock.drain() == [
        step_of(
            {
                "data_wait": 60,
                "input_dist": 7,
                "embedding_forward": 11,
                "dense_backward": 15,
                "optimizer": 2,
                "step": 95,
            }
        )
    ]


def test_each_step_has_its_own_wait_and_drain_empties(clock, time):
    batches = clock.timed(slow_batches(time, 20, 0, 30))
    for _ in range(2):
        clock.begin()
        micro_batch(clock, time, batches, input_dist=1, embedding_forward=1)
        clock.finish()
        time.now_ms += 500  # logging or evaluation, part of no step
    assert [(ms["data_wait"], ms["step"]) for ms in clock.drain()] == [pytest.approx((20, 22)), pytest.approx((0, 2))]
    assert clock.drain() == []
    clock.begin()
    micro_batch(clock, time, batches, input_dist=1)
    clock.finish()
    assert [(ms["data_wait"], ms["step"]) for ms in clock.drain()] == [pytest.approx((30, 31))]


def test_time_of_no_stage_is_in_the_step_only(clock, time):
    clock.begin()
    micro_batch(
        clock,
        time,
        clock.timed(slow_batches(time, 0)),
        input_dist=1,
        embedding_forward=2,
        dense_backward=3,
        optimizer=4,
    )
    time.now_ms += 5
    clock.finish()
    [ms] = clock.drain()
    assert ms["step"] == pytest.approx(15) and sum(ms[stage] for stage in STAGES) == pytest.approx(10)


def test_a_step_that_found_the_data_ended_is_no_step(clock, time):
    batches = clock.timed(slow_batches(time, 1))
    assert len(list(batches)) == 1  # every batch is handed on, and the end too
    clock.begin()
    with pytest.raises(StopIteration):
        next(batches)
    assert clock.drain() == []
