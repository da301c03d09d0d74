import pytest

from dlrm_scale.resilience.goodput import Event, EventLog, goodput, read_events

KILLED_AND_RESUMED = [
    Event("start", 0, 100.0),
    Event("ready", 0, 110.0, 0),
    Event("progress", 0, 120.0, 10),
    Event("save", 0, 122.0, 10, 2.0),
    Event("progress", 0, 132.0, 20),  # killed at 135, five steps further on; back at 140 from step 10
    Event("start", 1, 140.0),
    Event("ready", 1, 148.0, 10),
    Event("progress", 1, 158.0, 20),
    Event("evaluation", 1, 161.0, 20, 3.0),
    Event("end", 1, 161.5, 20),
]


def test_every_second_is_accounted_for_by_cause():
    spent = goodput(KILLED_AND_RESUMED)
    assert spent.startup == 10 + 8
    assert spent.save == 2
    assert spent.evaluation == 3
    assert spent.recomputed == 10
    assert spent.down == 8
    assert spent.useful == 10 + 10 + 0.5
    assert spent.total == pytest.approx(161.5 - 100)
    assert spent.fraction == pytest.approx(20.5 / 61.5)


def test_a_resume_between_two_logs_splits_their_time_by_steps():
    events = [
        Event("start", 0, 0.0),
        Event("ready", 0, 0.0, 0),
        Event("progress", 0, 8.0, 4),
        Event("start", 1, 8.0),
        Event("ready", 1, 8.0, 3),
        Event("progress", 1, 10.0, 4),
    ]
    assert goodput(events).recomputed == 2.0


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path, attempt=0)
    log.add("start", at=1.0)
    log.add("ready", step=3, at=2.0)
    with path.open("a") as f:
        f.write('{"kind": "progr')
    whole = [Event("start", 0, 1.0), Event("ready", 0, 2.0, 3)]
    assert read_events(path) == whole
    EventLog(path, attempt=1).add("start", at=5.0)
    assert read_events(path) == [*whole, Event("start", 1, 5.0)]


def test_a_new_attempt_sees_the_events_of_the_last_one(tmp_path):
    path = tmp_path / "events.jsonl"
    EventLog(path, attempt=0).add("start", at=1.0)
    later = EventLog(path, attempt=1)
    later.add("start", at=4.0)
    assert [e.attempt for e in later.events] == [0, 1]
    assert goodput(later.events).down == 3.0


def test_an_attempt_that_never_got_ready_does_not_hide_what_was_trained_again():
    events = [
        Event("start", 0, 0.0),
        Event("ready", 0, 1.0, 0),
        Event("progress", 0, 5.0, 4),
        Event("start", 1, 6.0),  # killed while it loaded
        Event("start", 2, 8.0),
        Event("ready", 2, 9.0, 0),
        Event("progress", 2, 13.0, 4),
    ]
    spent = goodput(events)
    assert (spent.recomputed, spent.useful, spent.down, spent.startup) == (4.0, 4.0, 3.0, 2.0)


def test_no_events_lose_nothing():
    assert goodput([]).fraction == 1.0
