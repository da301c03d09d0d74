import math

import pytest

from dlrm_scale.checkpoint.interval import FIRST_SAVE_STEPS, SaveSchedule, best_interval_seconds


def lost_fraction(interval: float, save: float, mtbf: float) -> float:
    """Of the expected wall-clock time with exponential failures and no restart cost (Daly 2006, eq. 20)."""
    return 1 - interval / (mtbf * (math.exp((interval + save) / mtbf) - 1))


@pytest.mark.parametrize(("save", "mtbf"), [(0.1, 86_400), (5, 3_600), (60, 7_200), (300, 3_600)])
def test_no_interval_nearby_loses_less(save, mtbf):
    best = best_interval_seconds(save, mtbf)
    least = lost_fraction(best, save, mtbf)
    for factor in (0.7, 0.9, 1.1, 1.4):
        assert lost_fraction(best * factor, save, mtbf) > least


def test_saves_that_cost_more_than_failures_are_as_rare_as_those():
    assert best_interval_seconds(500, 200) == 200


def test_a_measured_schedule_saves_when_it_pays():
    schedule = SaveSchedule(None, mtbf_seconds=3600)
    schedule.begin(40)
    assert not schedule.is_due(40 + FIRST_SAVE_STEPS - 1) and schedule.is_due(40 + FIRST_SAVE_STEPS)
    steps = schedule.interval_steps(save_seconds=2.0, step_seconds=0.5)
    assert steps == pytest.approx(2 * math.sqrt(2 * 2.0 * 3600), rel=0.03)
    schedule.measured(140, steps)
    assert not schedule.is_due(140 + steps - 1) and schedule.is_due(140 + steps)


@pytest.mark.parametrize(("every", "due"), [(0, []), (3, [3, 6])])
def test_a_given_interval_is_kept(every, due):
    schedule = SaveSchedule(every, mtbf_seconds=1)
    schedule.begin(1)
    assert [step for step in range(8) if schedule.is_due(step)] == due
