"""k steps, an end in mid-run, a resume, the rest: the same bits as the unbroken run, for every rule, pipeline and source."""

from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import Files
from dlrm_scale.config import RunConfig
from dlrm_scale.data.open import open_source
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.resilience.watchdog import Watchdog
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.checkpoints import RunCheckpoints, checkpoint_folder
from dlrm_scale.training.keepers import Keepers
from dlrm_scale.training.monitor import Board
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import this_rank
from dlrm_scale.training.readers import EvalReader, TrainReader
from dlrm_scale.training.state import seed_generators
from dlrm_scale.training.trainer import Trainer
from tests.support.checkpoints import tensor_of
from tests.support.configs import tiny_config
from tests.support.twin import make_plan
from tools.checkpoint.compare import compare

SHARDING = {
    "user": {"types": ["row_wise"]},
    "tag": {"types": ["data_parallel"]},
    "item": {"types": ["column_wise"], "min_partition": 4},
    "category": {"types": ["table_wise"]},
}
STEPS, SAVE_AT, CUT_AT = 12, 5, 7  # the first attempt trains on after its save, and is lost


class CutReader(TrainReader):
    """Ends after CUT_AT steps, as the process would."""

    def _rows(self, first_epoch: int, first_step: int):
        return islice(super()._rows(first_epoch, first_step), CUT_AT * self.accumulate_steps)


def attempt(config: RunConfig, plan: Plan, folder: str, cut: bool) -> list[float]:
    """Trains in `folder` as far as it goes; the losses."""
    rank = this_rank("cpu")
    seed_generators(config.seed, rank, 0)
    checkpoints = RunCheckpoints(config, rank, checkpoint_folder(config, folder), lambda line: None)
    model = build_model(config, dense_device=torch.device("cpu"))
    sharded = shard_model(model, plan, config, torch.device("cpu"))
    readers = [
        kind(config, rank, open_source(config.data, config.features, split, config.seed))
        for kind, split in ((CutReader if cut else TrainReader, "train"), (EvalReader, "eval"))
    ]
    board = Board(None)
    checkpoints.attach(plan, board)
    keepers = Keepers(Watchdog(rank.index, rank.world_size, 0, 0), checkpoints=checkpoints)
    return Trainer(config, rank, sharded, *readers, board, Progress(None, 0), keepers).train().losses


def run_config(**sections) -> RunConfig:
    train = {"max_steps": STEPS, "schedule": {"warmup_steps": 3, "decay": "cosine"}} | sections.pop("train", {})
    return tiny_config(
        sharding={"tables": SHARDING},
        train=train,
        eval={"every_steps": 4, "max_samples": 128},
        log={"every_steps": 3, "window_samples": 300},
        checkpoint={"every_steps": SAVE_AT, "keep_last": 9} | sections.pop("checkpoint", {}),
        **sections,
    )


def manifest_of(folder: Path, step: int):
    return CheckpointFolder(f"{folder}/checkpoints", Files()).manifest(step)


def compare_ends(unbroken: Path, resumed: Path) -> list[str]:
    """Keys of the last checkpoints' tensors that differ."""
    sides = []
    for folder in (unbroken, resumed):
        place = CheckpointFolder(f"{folder}/checkpoints", Files())
        sides.append((place, place.manifest(STEPS)))
    rows = compare(*sides, Files())
    assert {"ranks/torch_rng", "ranks/loss_sum", "window/logits_BT", "tables/user/weight"} <= {r["key"] for r in rows}
    return [f"{row['key']}: {row['difference']} {row['note'] or ''}" for row in rows if row["difference"] != 0]


def dropped_model(**changes):
    return {
        "arch": "interformer",
        "dim": 8,
        "num_layers": 1,
        "num_heads": 2,
        "dcn_rank": 4,
        "head_hidden": [16],
    } | changes


CASES = {
    "row-wise Adagrad, Adam, dropout": {"model": dropped_model(dropout=0.3)},
    "Adagrad, Adagrad, plain loop": {
        "train": {"sparse": {"name": "adagrad"}, "dense": {"name": "adagrad"}, "pipeline": "none"}
    },
    "SGD, SGD, clipped": {"train": {"sparse": {"name": "sgd"}, "dense": {"name": "sgd"}, "clip_grad_norm": 0.1}},
    "accumulation, AdamW, bf16, dropout": {
        "train": {"accumulate_steps": 4, "dense": {"name": "adamw"}, "precision": "bf16"},
        "model": dropped_model(dropout=0.1),
    },
    "several epochs, saved in sync": {
        "data": {"source": {"kind": "synthetic", "num_train": 260, "num_eval": 100}},
        "train": {"epochs": 9},
        "checkpoint": {"mode": "sync"},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(two_ranks, tmp_path, case):
    config = run_config(**CASES[case])
    check_bitwise(two_ranks, tmp_path, config)


def check_bitwise(two_ranks, tmp_path, config) -> None:
    plan = make_plan(config, 2, 2)
    assert {name: table.sharding_type for name, table in plan.tables.items()} == {
        name: constraint["types"][0] for name, constraint in SHARDING.items()
    }
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    whole = two_ranks.run(attempt, config, plan, str(unbroken), False)[0]
    two_ranks.run(attempt, config, plan, str(resumed), True)
    assert CheckpointFolder(f"{resumed}/checkpoints", Files()).steps() == [SAVE_AT]
    rest = two_ranks.run(attempt, config, plan, str(resumed), False)[0]
    assert rest == whole and len(whole) == 6  # logs at 3, 6, 9, 12 and before the evaluations at 4, 8
    assert compare_ends(unbroken, resumed) == []
    mine, theirs = (manifest_of(folder, STEPS) for folder in (unbroken, resumed))
    assert repr(mine.progress) == repr(theirs.progress)  # repr: NaN is not itself
    assert mine.samples_consumed == theirs.samples_consumed
    moved = tensor_of(f"{unbroken}/checkpoints/step_{SAVE_AT}", "tables/user/weight")
    assert not torch.equal(moved, tensor_of(f"{unbroken}/checkpoints/step_{STEPS}", "tables/user/weight"))


def test_fp16_tables_and_a_source_of_files_with_mended_rows(two_ranks, tmp_path):
    rows = 1000
    table = pa.table(
        {
            "user": [i * 7 for i in range(rows)],
            "item": [i % 300 for i in range(rows)],
            "category": [i % 20 for i in range(rows)],
            "tags": [[i % 100, 3][: i % 3] for i in range(rows)],
            "age": [0.5 * (i % 7) for i in range(rows)],
            "price": [float(i % 5) for i in range(rows)],
            "history_item": [[1, 2, 3][: i % 4] for i in range(rows)],
            "history_category": [[1, 2, 3][: i % 4] for i in range(rows)],
            "click": [i % 2 for i in range(rows)],
            "user_group": list(range(rows)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    split = {"paths": [str(tmp_path / "a.parquet")]}
    tables = {
        "user": {"num_embeddings": 500, "out_of_range": "modulo"},
        "item": {"num_embeddings": 300},
        "category": {"num_embeddings": 20},
        "tag": {"num_embeddings": 100, "pooling": "mean"},
    }
    config = run_config(
        features={"tables": {n: t | {"embedding_dim": 8, "data_type": "fp16"} for n, t in tables.items()}},
        data={"source": {"kind": "parquet", "train": split, "eval": split}, "shuffle_window_blocks": 2},
        train={"epochs": 2},
    )
    check_bitwise(two_ranks, tmp_path, config)
    counted = manifest_of(tmp_path / "resumed", STEPS).progress["counted"]["windows"]
    assert any(counted.values()), "nothing was mended, so the test tells nothing of the counts"


def test_criteo_files(two_ranks, tmp_path):
    lines = [
        "\t".join([str(i % 2), *[str(i % 7)] * 13, *(f"{(i * (k + 3)) % 500:x}" for k in range(26))])
        for i in range(1200)
    ]
    (tmp_path / "day.tsv").write_text("\n".join(lines) + "\n")
    split = {"paths": [str(tmp_path / "day.tsv")]}
    tables = {"user": 300, "item": 200, "category": 20, "tag": 100}  # fewer rows than ids: they are mended
    config = run_config(
        features={
            "tables": {
                n: {"num_embeddings": r, "embedding_dim": 8, "out_of_range": "modulo"} for n, r in tables.items()
            },
            "dense": [{"name": "int_0"}],
            "categorical": [{"name": f"cat_{i}", "table": name} for i, name in enumerate(tables)],
            "sequences": [],
            "labels": ["label"],
            "group": None,
        },
        data={"source": {"kind": "criteo", "format": "tsv", "train": split, "eval": split}},
        model={"mode": "sole"},  # what has no sequences
    )
    check_bitwise(two_ranks, tmp_path, config)


def losses_of(folder: Path, step: int) -> list[float]:
    return manifest_of(folder, step).progress["losses"]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_samples(two_ranks, four_ranks, tmp_path, before, after):
    pools, config = {2: two_ranks, 4: four_ranks}, run_config()
    plans = {n: make_plan(config, n, 2) for n in pools}
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    whole = pools[before].run(attempt, config, plans[before], str(unbroken), False)[0]
    pools[before].run(attempt, config, plans[before], str(resumed), True)
    rest = pools[after].run(attempt, config, plans[after], str(resumed), False)[0]
    assert rest == pytest.approx(whole, abs=1e-4)
    ends = [f"{folder}/checkpoints/step_{STEPS}" for folder in (unbroken, resumed)]
    for column in ("labels_BT", "weights_B", "groups_B"):  # no row lost, doubled or moved, across the change too
        windows = [tensor_of(end, f"window/{column}") for end in ends]
        assert torch.equal(*windows), column
    predicted = [tensor_of(end, "window/logits_BT") for end in ends]
    torch.testing.assert_close(*predicted, atol=1e-3, rtol=0)
    for table in SHARDING:
        torch.testing.assert_close(*(tensor_of(end, f"tables/{table}/weight") for end in ends), atol=1e-3, rtol=0)


def test_a_warm_start_takes_weights_by_rules_and_begins_anew(two_ranks, tmp_path):
    first = run_config()
    two_ranks.run(attempt, first, make_plan(first, 2, 2), str(tmp_path / "first"), False)
    rules = {"path": str(tmp_path / "first"), "grown_tables": ["user"], "fresh_dense": ["arch.head"]}
    tables = {name: dict(table) for name, table in TABLES.items()}
    tables["user"]["num_embeddings"] = 700
    still = {"lr": 0.0}  # so that what was taken over shows at the end
    changes = {
        "features": {"tables": tables},
        "model": dropped_model(head_hidden=[24]),
        "train": {"sparse": still, "dense": {"name": "sgd", "lr": 0.0}},
    }
    config = run_config(**changes, checkpoint={"warm_start": rules | {"fresh_optimizer": True}})
    two_ranks.run(attempt, config, make_plan(config, 2, 2), str(tmp_path / "second"), False)
    source, end = (str(tmp_path / run / "checkpoints" / f"step_{STEPS}") for run in ("first", "second"))
    for table in ("item", "category", "tag"):
        assert torch.equal(tensor_of(source, f"tables/{table}/weight"), tensor_of(end, f"tables/{table}/weight"))
    user = tensor_of(end, "tables/user/weight")
    assert torch.equal(user[:500], tensor_of(source, "tables/user/weight"))
    assert user[500:].abs().max() <= 700**-0.5 and user[500:].std() > 0
    unruled = run_config(**changes, checkpoint={"warm_start": rules | {"grown_tables": [], "fresh_optimizer": True}})
    with pytest.raises(AssertionError, match=r"tables/user/weight: 500 x 8 float32 in the checkpoint, 700 x 8 float32"):
        two_ranks.run(attempt, unruled, make_plan(unruled, 2, 2), str(tmp_path / "third"), False)


TABLES = {
    "user": {"num_embeddings": 500, "embedding_dim": 8},
    "item": {"num_embeddings": 300, "embedding_dim": 8},
    "category": {"num_embeddings": 20, "embedding_dim": 8},
    "tag": {"num_embeddings": 100, "embedding_dim": 8, "pooling": "mean"},
}
