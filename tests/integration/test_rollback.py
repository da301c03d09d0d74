"""A real job that meets numbers that are none: going back and leaving the step out ends as skipping it does."""

import json

import numpy as np
import pytest

from tools.audit_data import main as audit_tool
from tools.chaos.cli import SMALL_STEPS
from tools.chaos.faults import Fault
from tools.chaos.job import Runner
from tools.chaos.schedule import Job, Launch
from tools.checkpoint.cli import main as checkpoint_tool

STEP = 5  # counted from 0; saves are every fourth step
SHORT = ("train.max_steps=14", "resilience.watchdog_seconds=120")


@pytest.mark.timeout(200)
def test_a_save_before_anything_was_learned_can_be_gone_on_from(tmp_path):
    runner = Runner(tmp_path, "configs/quickstart.yaml", SMALL_STEPS + SHORT, launch_seconds=120)
    faults = (Fault("nan", 0, "batch", 1),)
    job = Job("skip", (Launch(faults),), ("train.nonfinite=skip", "checkpoint.every_steps=1", "train.max_steps=1"))
    (ended,) = runner.run(job, "run", np.random.default_rng(0))
    assert ended.problem is None, ended.output
    longer = Job("skip", (Launch(),), ("train.nonfinite=skip", "train.max_steps=3"))
    (ended,) = runner.run(longer, "run", np.random.default_rng(0))
    assert ended.problem is None and "resumed from" in ended.output, ended.output
    record = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])
    assert record["skipped_micro_batches"] == 1 and record["num_steps"] == 3


@pytest.mark.timeout(300)
def test_a_rollback_ends_with_the_bytes_of_a_skip(tmp_path, capsys):
    runner = Runner(tmp_path, "configs/quickstart.yaml", SMALL_STEPS + SHORT, launch_seconds=120)
    outputs = {}
    for policy in ("skip", "rollback"):
        job = Job(policy, (Launch((Fault("nan", 1, "batch", STEP + 1),)),), (f"train.nonfinite={policy}",))
        (ended,) = runner.run(job, policy, np.random.default_rng(0))
        assert ended.problem is None, ended.output
        outputs[policy] = ended.output
        [record] = [json.loads(line) for line in (tmp_path / f"{policy}.jsonl").read_text().splitlines()]
        assert record["skipped_micro_batches"] == 1 and record["num_steps"] == 14
        assert audit_tool([str(tmp_path / policy)]) == 0, capsys.readouterr().out
        assert (tmp_path / policy / "bad_batches" / f"step_{STEP}_rank_1.pt").exists()
    assert f"going back to the newest checkpoint, to leave out step {STEP}" in outputs["rollback"]
    assert "resumed from" in outputs["rollback"] and "resumed from" not in outputs["skip"]
    assert checkpoint_tool(["diff", str(tmp_path / "skip"), str(tmp_path / "rollback")]) == 0, capsys.readouterr().out
