"""The main job through the launchers that users call: what it computes, shows, writes and refuses."""

import copy
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dlrm_scale.config_io import fingerprint, load_config
from dlrm_scale.training.clock import STAGES
from tests.support.configs import TINY
from tests.support.launch import ROOT, Outcome, finish, launch

# Sums over ranks run in another order than over one rank's rows, and a step feeds the next: float32 rounding grows slowly.
WORLD_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Outcome:
    outcome = launch(tmp_path_factory.mktemp("two"), "eval.every_steps=10")
    assert outcome.code == 0, outcome.errors
    return outcome


@pytest.mark.parametrize("nproc", [None, 1, 4])
def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(two_ranks, tmp_path, nproc):
    other = launch(tmp_path, "eval.every_steps=10", nproc=nproc)
    assert other.code == 0, other.errors
    mine, theirs = other.records[0], two_ranks.records[0]
    assert len(mine["losses"]) == 4
    assert mine["losses"] == pytest.approx(theirs["losses"], abs=WORLD_TOLERANCE)
    assert mine["metrics"]["click"] == pytest.approx(theirs["metrics"]["click"], abs=1e-3)
    assert mine["oracle"] == theirs["oracle"]


def test_torchx_gives_the_same_losses_as_torchrun(two_ranks, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TINY))
    places = [f"output.dir={tmp_path / 'run'}", f"output.records={tmp_path / 'records.jsonl'}"]
    component = ["--config", str(tmp_path / "config.yaml"), "--nproc", "2", "--", "eval.every_steps=10", *places]
    outcome = finish(["torchx", "run", "-s", "local_cwd", "launchers/torchx_component.py:train", *component], tmp_path)
    assert outcome.code == 0, outcome.errors
    assert outcome.records[0]["losses"] == two_ranks.records[0]["losses"]


def test_event_files_hold_what_people_watch(two_ranks):
    events = EventAccumulator(str(two_ranks.run_dir), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    wanted = {"train/loss", "learning_rate/dense", "learning_rate/sparse", "memory/host_bytes", "speed/samples_per_s"}
    wanted |= {f"train/click/{m}" for m in ("ne", "auc", "gauc", "calibration", "log_loss")}
    wanted |= {f"eval/click/{m}" for m in ("ne", "auc", "gauc", "calibration", "log_loss")}
    wanted |= {f"time_ms/{s}" for s in ("step", *STAGES)}
    wanted |= {"data/samples_consumed"}
    assert wanted <= set(events.Tags()["scalars"]), wanted - set(events.Tags()["scalars"])
    losses = events.Scalars("train/loss")
    assert [e.step for e in losses] == [5, 10, 15, 20]
    assert [e.value for e in losses] == pytest.approx(two_ranks.records[0]["losses"], rel=1e-6)
    assert [e.step for e in events.Scalars("eval/click/auc")] == [10, 20]
    assert {"config/text_summary", "plan/text_summary"} <= set(events.Tags()["tensors"])
    stages = {s: events.Scalars(f"time_ms/{s}")[-1].value for s in STAGES}
    assert min(stages[s] for s in STAGES if s != "data_wait") > 0, stages
    step = events.Scalars("time_ms/step")[-1].value
    assert 0.5 * step < sum(stages.values()) <= 1.01 * step, (stages, step)


def test_the_run_folder_says_what_was_run(two_ranks, tmp_path):
    record = two_ranks.records[0]
    config = load_config(two_ranks.run_dir / "config.yaml")
    assert record["config_fingerprint"] == fingerprint(config)
    assert config.train.max_steps == 20 and config.eval.every_steps == 10
    assert record["num_steps"] == 20 and record["samples_consumed"] == 20 * 64
    assert set(record["step_ms"]) == {"p10", "p50", "p90"} and len(record["peak_memory"]) == 2
    assert set(record["plan"]["sharding_types"]) == {"user", "item", "category", "tag"}
    replay = launch(tmp_path, "eval.every_steps=10", f"sharding.plan={two_ranks.run_dir / 'plan.json'}")
    assert replay.code == 0, replay.errors
    assert replay.records[0]["losses"] == record["losses"]


def test_the_final_table_stands_beside_the_oracle_and_logs_are_quiet(two_ranks):
    assert "oracle" in two_ranks.output and "AUC" in two_ranks.output
    assert "next: tensorboard --logdir" in two_ranks.output
    assert two_ranks.errors == ""
    assert all(len(line) <= 100 for line in two_ranks.output.splitlines() if str(two_ranks.run_dir) not in line)


def test_an_epoch_trains_on_each_sample_once_and_pads_the_last_batch(tmp_path):
    outcome = launch(tmp_path, "train.max_steps=null", "data.source.num_train=1000", "train.epochs=2")
    assert outcome.code == 0, outcome.errors
    assert outcome.records[0]["num_steps"] == 2 * 16
    assert outcome.records[0]["samples_consumed"] == 2000


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["train.global_batchsize=3"], 2, ["train.global_batchsize", "nearest is global_batch_size"]),
        (
            ["data.lanes=3", "train.global_batch_size=63"],
            2,
            ["data.lanes (3)", "number of ranks (2)", "data.lanes=4 train.global_batch_size=64"],
        ),
        (["sharding.plan=nowhere.json"], 1, ["nowhere.json", "No such file"]),
        (["output.dir=/dev/null/run"], 2, ["/dev/null", "output.dir="]),
        (["device=cuda"], 2, ["device is cuda", "0 usable GPUs"]),
        (["train.sparse.name=lamb"], 2, ["lamb", "CUDA only"]),
        (["output.dir=runs/{foo}"], 2, ["{foo}", "{name} and {time}"]),
        (["train.dense={name: sgd, lr: 1e30}"], 1, ["the loss is nan", "train.dense.lr"]),
    ],
)
def test_a_users_mistake_ends_in_one_screen(tmp_path, overrides, code, said):
    outcome = launch(tmp_path, *overrides, timeout=60)
    assert outcome.records == []
    first = outcome.errors.strip().splitlines()[0]
    assert first.startswith("error"), outcome.errors
    assert all(part in outcome.errors for part in said), outcome.errors
    assert "Traceback" not in outcome.errors and outcome.errors.count("error") == 1
    assert len(outcome.errors.splitlines()) < 40
    assert outcome.code == code


def test_a_used_output_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir(parents=True)
    (tmp_path / "run" / "old").touch()
    outcome = launch(tmp_path, nproc=None)
    assert outcome.code == 2 and "neither new, empty, nor a run's folder" in outcome.errors
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["old"]


def test_a_plan_of_another_model_is_refused(two_ranks, tmp_path):
    tree = copy.deepcopy(TINY)
    tree["features"]["tables"]["user"]["num_embeddings"] = 501
    outcome = launch(tmp_path, f"sharding.plan={two_ranks.run_dir / 'plan.json'}", tree=tree)
    assert outcome.code != 0
    assert outcome.errors.startswith("error") and "user: num_embeddings is 500 in the plan, 501" in outcome.errors


def test_bad_data_of_one_file_stops_all_ranks(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 600
    columns = {
        "user": pa.array([i % 500 for i in range(rows)]),
        "item": pa.array([i % 300 for i in range(rows)]),
        "category": pa.array([i % 20 for i in range(rows)]),
        "tags": pa.array([[i % 100, 3] for i in range(rows)]),
        "age": pa.array([0.5] * rows),
        "price": pa.array([1.0] * rows),
        "history_item": pa.array([[1, 2, 3][: i % 4] for i in range(rows)]),
        "history_category": pa.array([[1, 2, 3][: i % 4] for i in range(rows)]),
        "click": pa.array([i % 2 for i in range(rows)]),
        "user_group": pa.array(list(range(rows))),
    }
    pq.write_table(pa.table(columns), tmp_path / "good.parquet", row_group_size=100)
    columns["item"] = columns["item"].to_pylist()
    columns["item"][437] = 300
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet", row_group_size=100)
    for name, checked in (("good", 10**6), ("bad", 10**6), ("bad", 0)):
        tree = copy.deepcopy(TINY)
        tree["data"]["source"] = {"kind": "parquet", "train": {"paths": [str(tmp_path / f"{name}.parquet")]}}
        tree["data"]["preflight_rows"] = checked  # 0: the bad row is met in mid-training, by one rank
        outcome = launch(tmp_path / f"{name}{checked}", "train.max_steps=null", tree=tree, timeout=60)
        if name == "good":
            assert outcome.code == 0 and outcome.records[0]["samples_consumed"] == rows, outcome.errors
            continue
        assert outcome.code != 0 and outcome.records == []
        assert outcome.errors.startswith("error"), outcome.errors
        for part in ("bad.parquet", "item", "437", "300"):
            assert part in outcome.errors.splitlines()[0] + outcome.errors.splitlines()[1], outcome.errors


def test_readme_fits_its_promise():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
    assert Path(ROOT / ".ci" / "run").exists()
