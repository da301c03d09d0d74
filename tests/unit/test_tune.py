"""tools.tune without launches: what is decided of measured figures, and what is refused before anything starts."""

import argparse
import gzip
import json
import math

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import kendalltau

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.featurise import Featuriser
from dlrm_scale.tuning.launcher import Limits
from dlrm_scale.tuning.model_search import PredictorSearcher
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.records import append_record
from dlrm_scale.tuning.scores import kendall_tau
from dlrm_scale.tuning.space import load_space
from dlrm_scale.tuning.trial import failed_record
from tests.support.spaces import QUICK, write_space
from tools.charts import Axis
from tools.tune.__main__ import main
from tools.tune.common import learning_settings
from tools.tune.report import frontier
from tools.tune.run import Search
from tools.tune.session import Session
from tools.tune.verify import MOST_UNCERTAIN, Quality, Speed, Verifier, ne_of, throughput

KNOBS = {"batch": {"kind": "categorical", "key": "train.global_batch_size", "values": [64, 128]}}


@pytest.fixture
def space_file(tmp_path):
    return write_space(tmp_path, KNOBS)


# ------------------------------------------------------------ speed and quality
def test_the_gain_is_the_median_of_pairs_not_of_all_runs():
    speed = Speed(base=[100.0, 200.0, 50.0], candidate=[130.0, 236.0, 60.0])  # the machine's speed changed in between
    assert speed.gain == pytest.approx(1.2) and speed.is_certain


@pytest.mark.parametrize(
    "gains",
    [
        [1.5, 0.995, 1.5],  # slower once
        [1.01, 1.09, 1.02],  # faster each time, by as much as the repeats differ
    ],
)
def test_a_gain_that_noise_explains_is_not_certain(gains):
    assert not Speed([100.0] * len(gains), [100.0 * gain for gain in gains]).is_certain


def test_candidates_equal_to_the_base_seldom_pass():
    """Eight candidates that are the base itself, under 3 % of noise, at most MOST_UNCERTAIN of them tried."""
    rng, passed = np.random.default_rng(0), 0
    for _ in range(500):
        tries = [Speed(*(100 * np.exp(0.03 * rng.standard_normal((2, 3)))).tolist()) for _ in range(MOST_UNCERTAIN)]
        passed += any(speed.is_certain for speed in tries)
    assert passed / 500 < 0.2


def test_the_verdict_compares_what_came_through_not_the_median_step():
    """One step in ten waits for data: the median does not show it."""
    record = {"outcome": "ok", "config": {"train": {"global_batch_size": 100}}, "step_ms": {"p50": 10.0}}
    assert throughput({**record, "samples_per_second": 7000.0}) == 7000.0
    assert throughput({"outcome": "failed"}) == 0.0


@pytest.mark.parametrize(
    ("candidate", "within", "hopeless"),
    [
        ([0.800, 0.802, 0.804], True, False),  # the same
        ([0.790, 0.792, 0.794], True, False),  # better
        ([0.803, 0.805, 0.807], True, False),  # worse by 0.003, of a noise of 2 x 0.002 x sqrt(2/3) = 0.0033
        ([0.804, 0.806, 0.808], False, False),  # worse by 0.004
        ([0.820], False, True),  # one seed shows it
        ([math.inf], False, True),  # it diverged
    ],
)
def test_quality_within_noise(candidate, within, hopeless):
    quality = Quality("click", [0.800, 0.802, 0.804], candidate)
    assert (quality.is_within_noise, quality.is_hopeless) == (within, hopeless)


def test_an_ne_that_is_no_number_is_worse_than_any():
    assert ne_of([{"metrics": {"click": {"ne": None}}}, {"metrics": {"click": {"ne": 0.8}}}], "click") == [
        math.inf,
        0.8,
    ]


# ------------------------------------------------------------ report
def test_the_frontier_joins_what_no_other_beats():
    runs = [(2.0, 10.0), (1.0, 5.0), (3.0, 9.0), (1.0, 4.0), (4.0, 11.0)]
    assert frontier(runs) == [(1.0, 5.0), (2.0, 10.0), (4.0, 11.0)]


@pytest.mark.parametrize("seed", range(5))
def test_kendall_tau_with_ties(seed):
    one, other = np.random.default_rng(seed).integers(0, 6, size=(2, 30)).astype(float)
    assert kendall_tau(one, other) == pytest.approx(kendalltau(one, other).statistic)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.5, 200.0]])
def test_an_axis_shows_all_values(values, log):
    axis = Axis.around("ms", values, log)
    assert all(0 < axis.part(value) < 1 for value in values)
    assert axis.part(axis.low) == 0 and axis.part(axis.high) == pytest.approx(1)


# ------------------------------------------------------------ folders
def test_a_folder_of_another_space_is_refused(space_file, tmp_path):
    session = Session(tmp_path / "f", load_space(space_file), Console(quiet=True))
    session.save(searcher={}, asked={})
    session.lock.close()
    write_space(tmp_path, KNOBS, {**QUICK, "train": {**QUICK["train"], "max_steps": 21}})
    with pytest.raises(ConfigError, match="go on with the files as they were, or name another --folder"):
        Session(tmp_path / "f", load_space(space_file), Console(quiet=True))


def test_a_folder_is_held_by_one_process_at_a_time(space_file, tmp_path):
    session = Session(tmp_path / "f", load_space(space_file), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"another tools\.tune works in"):
        Session(tmp_path / "f", load_space(space_file), Console(quiet=True))
    session.lock.close()


def test_history_stays_what_it_was_when_the_search_began(space_file, tmp_path):
    session = Session(tmp_path / "f", load_space(space_file), Console(quiet=True))
    (tmp_path / "a.jsonl").write_text('{"cut')
    (tmp_path / "b.jsonl").write_text('{"whole": 1}\n')
    (kept,) = session.keep_history([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert kept.read_text().splitlines()[:2] == ['{"cut', '{"whole": 1}']
    (tmp_path / "b.jsonl").write_text("")
    assert session.keep_history([]) == [kept] and "whole" in kept.read_text()
    with pytest.raises(ConfigError, match="began with other records"):
        session.keep_history([str(tmp_path / "b.jsonl")])
    session.lock.close()


def test_compressed_records_are_kept_as_lines(space_file, tmp_path):
    session = Session(tmp_path / "f", load_space(space_file), Console(quiet=True))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"whole": 1}\n'))
    assert session.keep_history([str(tmp_path / "a.jsonl.gz")])[0].read_text().splitlines()[0] == '{"whole": 1}'
    session.lock.close()


def test_a_folder_keeps_to_what_it_was_begun_with(space_file, tmp_path):
    session = Session(tmp_path / "f", load_space(space_file), Console(quiet=True))
    session.require_same(**{"--steps": 60, "torch": "2.13"})
    session.require_same(**{"--steps": 60, "torch": "2.13", "hardware": "a"})
    with pytest.raises(ConfigError, match="begun with --steps 60, but now --steps is 200"):
        session.require_same(**{"--steps": 200, "torch": "2.13"})
    session.lock.close()


class Judged(Verifier):
    """With verdicts on points instead of launches: batches above 128 learn worse, and one trial is not faster."""

    def _try(self, name, point):
        found = {"trial": name, "point": dict(point), "accepted": False, "certain": name != "trial_0003"}
        if point["batch"] > 128:
            self.worse.add(learning_settings(self.space, point))
        return {**found, "accepted": found["certain"] and point["batch"] <= 128}

    def _accept(self, name, point, tried):
        return {"accepted": name, "tried": tried}


def verifier(tmp_path, speeds: dict[tuple[int, str], float]) -> Judged:
    """Of a search that measured these samples a second, by batch and pipeline."""
    knobs = {
        "batch": {"kind": "categorical", "key": "train.global_batch_size", "values": [64, 128, 256, 512]},
        "pipeline": {"kind": "categorical", "key": "train.pipeline", "values": ["sparse_dist", "none"]},
    }
    session = Session(tmp_path / "f", load_space(write_space(tmp_path, knobs)), Console(quiet=True))
    config = {"train": {"global_batch_size": 100}}
    asked = {f"trial_{i:04}": {"batch": b, "pipeline": p} for i, (b, p) in enumerate(speeds, start=1)}
    for name, speed in zip(("base", *asked), (1000.0, *speeds.values()), strict=True):
        session.by_name[name] = {"outcome": "ok", "config": config, "step_ms": {"p50": 1e5 / speed}}
    session.save(asked=asked)
    return Judged(session, argparse.Namespace(limits=Limits()), Plans(), argparse.Namespace(quality_seeds=2))


def test_points_that_learn_as_one_that_failed_in_quality_are_not_tried(tmp_path):
    judged = verifier(
        tmp_path,
        {
            (512, "none"): 9e3,
            (512, "sparse_dist"): 8e3,
            (128, "none"): 7e3,
            (256, "none"): 6e3,
            (128, "sparse_dist"): 5e3,
        },
    )
    verdict = judged.go()
    assert [t["trial"] for t in verdict["tried"]] == ["trial_0001", "trial_0003", "trial_0004", "trial_0005"]
    assert verdict["accepted"] == "trial_0005"
    judged.session.lock.close()


def test_where_all_that_is_fast_learns_worse_there_may_be_more(tmp_path):
    judged = verifier(tmp_path, {(512, "none"): 9e3, (256, "none"): 8e3, (64, "none"): 900.0})
    assert judged.go()["accepted"] is None and judged.may_find_more
    space = judged.space
    assert judged.is_worse(space.point({"batch": 512, "pipeline": "sparse_dist"}))
    assert not judged.is_worse(space.point({"batch": 128, "pipeline": "none"}))
    judged.session.lock.close()


def search(space_file, folder, launches: int) -> Search:
    space, plans = load_space(space_file), Plans()
    session = Session(folder, space, Console(quiet=True))
    searcher = PredictorSearcher(Featuriser(space, plans), 0, budget=launches)
    return Search(session, searcher, plans, launches, steps=8)


def test_a_search_goes_on_from_results_that_it_was_not_told_and_trials_that_have_none(space_file, tmp_path):
    first = search(space_file, tmp_path / "f", launches=2)
    done, lost = first._next(), first._next()
    assert first._next() is None
    append_record(
        tmp_path / "f" / "records.jsonl", failed_record(done, "error: killed before it was told", False, True)
    )
    first.session.lock.close()
    again = search(space_file, tmp_path / "f", launches=2)
    assert [(point, result.reason) for point, result in again.searcher.told] == [
        (done.point, "error: killed before it was told")
    ]
    relaunched = again._next()
    assert (relaunched.name, relaunched.point) == (lost.name, lost.point) and again._next() is None
    again.session.lock.close()


def test_a_search_may_be_given_more_launches(space_file, tmp_path):
    first = search(space_file, tmp_path / "f", launches=1)
    one = first._next()
    first.session.lock.close()
    more = search(space_file, tmp_path / "f", launches=2)
    assert {more._next().point, more._next().point} > {one.point} and more._next() is None
    more.session.lock.close()


# ------------------------------------------------------------ command line
def test_suggest_works_without_a_record_and_says_how_sure_it_is(space_file, capsys):
    assert main(["suggest", "--space", str(space_file), "--top", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (best,) = result["suggestions"]
    assert "no run was measured" in result["basis"] and best["chance_faster_than_base"] is None
    assert best["point"] == {"batch": 128} and best["overrides"] == ["train.global_batch_size=128"]
    low, high = best["step_ms_90"]
    assert low < best["step_ms"] / 3 and high > best["step_ms"] * 3  # the analytic model alone may be far off


@pytest.mark.parametrize(
    ("command", "arguments", "code", "says"),
    [
        ("run", ["--launches", "0"], 2, "--launches must be 1 or more"),
        ("run", ["--quality-seeds", "1"], 2, "one shows no noise"),
        ("run", ["--steps", "7"], 2, "--steps must be 8 or more: warm-up and logs are parts of it, but is 7"),
        ("run", ["--hopeless", "1"], 2, "--hopeless must be"),
        ("run", ["--job-arg", "gpu"], 2, "--job-arg reads name=value"),
        ("run", ["--records", "nowhere.jsonl"], 2, "cannot read the records nowhere.jsonl"),
        ("run", ["--scheduler-args", "partition=gpu"], 2, "scheduler local_cwd has no setting partition=gpu"),
        ("collect", ["--points", "0"], 2, "--points must be 1 or more"),
        ("report", ["--out", "page.html"], 2, "cannot read the records"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_starts(space_file, tmp_path, capsys, command, arguments, code, says):
    assert main([command, "--space", str(space_file), "--folder", str(tmp_path / "f"), *arguments]) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "f" / "records.jsonl").exists()


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_an_empty_history_is_named(tmp_path, capsys, command):
    (tmp_path / "records.jsonl").write_text('{"format": 1}\n')
    out = ["--out", str(tmp_path / "p.pt")] if command == "fit" else []
    assert main([command, "--records", str(tmp_path / "records.jsonl"), *out]) == 2
    assert "are needed" in capsys.readouterr().err
