"""The trainer's loop on two ranks: pipelined, interrupted by evaluations, accumulated, on data that ends unevenly."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from dlrm_scale.config import RunConfig
from dlrm_scale.data.loader import batches, concatenate, prefetch, take
from dlrm_scale.data.open import open_source
from dlrm_scale.errors import DataError, PeerError
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import ShardedModel, shard_model
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.monitor import Board
from dlrm_scale.training.optimizers import TrainOptimizer
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import make_agree, this_rank
from dlrm_scale.training.readers import EvalReader, TrainReader
from dlrm_scale.training.trainer import Trainer, TrainResult
from tests.support.configs import tiny_config
from tests.support.twin import make_plan

SHARDING = {
    "user": {"types": ["row_wise"]},
    "tag": {"types": ["data_parallel"]},
    "item": {"types": ["column_wise"], "min_partition": 4},
    "category": {"types": ["table_wise"]},
}


def loop_config(**sections) -> RunConfig:
    train = {"max_steps": 12, "schedule": {"warmup_steps": 3, "decay": "cosine"}} | sections.pop("train", {})
    return tiny_config(sharding={"tables": SHARDING}, log={"every_steps": 1}, train=train, **sections)


def sharded_model(config: RunConfig, plan: Plan) -> ShardedModel:
    model = build_model(config, dense_device=torch.device("cpu"))
    return shard_model(model, plan, config, torch.device("cpu"))


def train(config: RunConfig, plan: Plan) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    """What the trainer reports on this rank, and its dense parameters afterwards."""
    rank, model = this_rank("cpu"), sharded_model(config, plan)
    readers = (
        reader(config, rank, open_source(config.data, config.features, split, config.seed))
        for reader, split in ((TrainReader, "train"), (EvalReader, "eval"))
    )
    result = Trainer(config, rank, model, *readers, Board(None), Progress(None, 0)).train()
    dense = {name: p.detach().clone() for name, p in model.module.named_parameters() if name.startswith("dense.")}
    return result, dense


def plain_loop(config: RunConfig, plan: Plan) -> list[float]:
    """The losses of the shortest loop there is."""
    rank, model = this_rank("cpu"), sharded_model(config, plan)
    reader = TrainReader(config, rank, open_source(config.data, config.features, "train", config.seed))
    optimizer = TrainOptimizer(model, config.train, reader.num_steps)
    losses = []
    with reader.batches() as stream:
        for batch in stream:
            optimizer.zero_grad()
            loss, _ = model(batch)
            loss.backward()
            optimizer.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(mean.item() / rank.world_size)
    return losses


@pytest.fixture(scope="module")
def plain(two_ranks) -> list[float]:
    config = loop_config()
    losses = two_ranks.run(plain_loop, config, make_plan(config, 2, 2))[0]
    assert len(losses) == 12 and losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize("pipeline", ["sparse_dist", "none"])
@pytest.mark.parametrize("eval_every", [0, 5])
def test_pipelines_and_evaluations_leave_the_losses_bitwise(two_ranks, plain, pipeline, eval_every):
    config = loop_config(train={"pipeline": pipeline}, eval={"every_steps": eval_every})
    (result, _), _ = two_ranks.run(train, config, make_plan(config, 2, 2))
    assert result.losses == plain
    assert result.num_steps == 12 and result.samples_consumed == 12 * 64
    assert 0.3 < result.eval_metrics["click"]["auc"] < 1


def test_accumulated_micro_batches_make_the_same_dense_step(two_ranks):
    """With frozen tables: those that are sharded step at each micro-batch, which is another thing (see docs/parity.md)."""
    frozen = {"sparse": {"lr": 0.0}, "dense": {"name": "sgd", "lr": 0.1}}
    whole, parts = (loop_config(train={**frozen, "accumulate_steps": k}) for k in (1, 4))
    runs = [two_ranks.run(train, config, make_plan(config, 2, 2)) for config in (whole, parts)]
    assert runs[0][0][0].losses == pytest.approx(runs[1][0][0].losses, abs=1e-5)
    for name, parameter in runs[0][0][1].items():
        torch.testing.assert_close(runs[1][0][1][name], parameter, atol=1e-5, rtol=0)
    assert all(torch.equal(runs[1][0][1][name], p) for name, p in runs[1][1][1].items()), "ranks drifted apart"


def test_accumulation_does_not_depend_on_the_number_of_ranks(two_ranks, four_ranks):
    """Each micro-batch holds the same samples, so tables that step at each one step alike."""
    config = loop_config(train={"accumulate_steps": 4})
    two, four = (
        ranks.run(train, config, make_plan(config, n, 2))[0][0] for ranks, n in ((two_ranks, 2), (four_ranks, 4))
    )
    assert two.losses == pytest.approx(four.losses, abs=1e-4)


def test_clipping_bounds_the_dense_step(two_ranks):
    config = loop_config(
        train={"max_steps": 1, "clip_grad_norm": 0.01, "dense": {"name": "sgd", "lr": 1.0}, "schedule": {}}
    )
    (_, after), _ = two_ranks.run(train, config, make_plan(config, 2, 2))
    start = dict(build_model(config, dense_device=torch.device("cpu")).named_parameters())
    moved = torch.cat([(after[name] - start[name]).flatten() for name in after]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-2)


def test_bf16_products_stay_close(two_ranks, plain):
    config = loop_config(train={"precision": "bf16"})
    (result, _), _ = two_ranks.run(train, config, make_plan(config, 2, 2))
    assert result.losses != plain
    assert result.losses == pytest.approx(plain, abs=0.02)


def uneven_ends(config: RunConfig, plan: Plan, steps_by_rank: tuple[int, int]) -> tuple[int, float, float]:
    """(batches trained on, weight trained on, weight there was) on this rank, whose rows end after its own number of steps."""
    rank, model = this_rank("cpu"), sharded_model(config, plan)
    source = open_source(config.data, config.features, "train", config.seed)
    rows = source.read_block(0)
    num_steps, local = steps_by_rank[rank.index], config.train.global_batch_size // 2
    own = [take(rows, np.arange(s * local, (s + 1) * local)) for s in range(num_steps)]
    optimizer = TrainOptimizer(model, config.train, max(steps_by_rank))
    pipeline = TrainPipelineSparseDist(model, optimizer, rank.device)
    stream = batches(iter(own), config.features, micro_batch_size=local, accumulate_steps=1, agree=make_agree())
    num_batches, weight = 0, 0.0
    with prefetch(stream, 2) as ready:
        while True:
            try:
                weight += pipeline.progress(ready).weights_B.sum().item()
            except StopIteration:
                break
            num_batches += 1
    return num_batches, weight, float(concatenate(own).weights_R.sum()) if own else 0.0


@pytest.mark.parametrize("steps_by_rank", [(7, 3), (0, 4), (2, 2)])
def test_data_that_ends_unevenly_ends_all_ranks_together_and_loses_no_row(two_ranks, steps_by_rank):
    config = loop_config()
    results = two_ranks.run(uneven_ends, config, make_plan(config, 2, 2), steps_by_rank)
    for num_batches, trained, there in results:
        assert num_batches == max(steps_by_rank)
        assert trained == there


def failing_reader(config: RunConfig) -> str:
    rank = this_rank("cpu")
    rows = open_source(config.data, config.features, "train", config.seed).read_block(0)

    def steps():
        for step in range(5):
            if rank.index == 1 and step == 3:
                raise DataError("row 17 is bad")
            yield take(rows, np.arange(32))

    stream = batches(steps(), config.features, micro_batch_size=32, accumulate_steps=1, agree=make_agree())
    count = 0
    try:
        with prefetch(stream, 2) as ready:
            for _ in ready:
                count += 1
    except PeerError:
        return f"peer after {count}"
    except DataError as e:
        return f"{e} after {count}"
    return "ended"


def test_a_rank_that_cannot_read_stops_the_others_too(two_ranks):
    assert two_ranks.run(failing_reader, loop_config()) == ["peer after 3", "row 17 is bad after 3"]


def test_readers_in_one_run_keep_their_agreements_apart(two_ranks):
    """The training reader runs ahead, in its thread, while the evaluation's reader agrees on other steps."""
    config = loop_config(
        train={"max_steps": 40},
        eval={"every_steps": 2},
        data={"prefetch_batches": 1, "source": {"kind": "synthetic", "num_train": 4000, "num_eval": 500}},
    )
    (result, _), _ = two_ranks.run(train, config, make_plan(config, 2, 2))
    assert result.num_steps == 40


def mended_counts(config: RunConfig) -> tuple[dict[str, int], dict[str, int]]:
    """What one epoch's readers of this rank count, for training and evaluation."""
    rank, counts = this_rank("cpu"), []
    for reader, split in ((TrainReader, "train"), (EvalReader, "eval")):
        made = reader(config, rank, open_source(config.data, config.features, split, config.seed))
        with made.batches() as stream:
            assert sum(1 for _ in stream) > 0
        counts.append(dict(made.reader.mended))
    return counts[0], counts[1]


def test_what_policies_changed_counts_once_at_any_number_of_ranks(two_ranks, four_ranks, tmp_path):
    rows = 3000
    numbers = np.arange(rows)
    table = pa.table(
        {"user": numbers, "item": numbers % 300, "h": [[1] * (i % 5) for i in range(rows)], "click": numbers % 2}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    split = {"paths": [str(tmp_path / "a.parquet")]}
    config = tiny_config(
        features={
            "tables": {
                "user": {"num_embeddings": 1000, "embedding_dim": 8, "out_of_range": "modulo"},
                "item": {"num_embeddings": 300, "embedding_dim": 8},
            },
            "dense": [],
            "categorical": [{"name": "user", "table": "user"}, {"name": "item", "table": "item"}],
            "sequences": [{"name": "history", "max_length": 3, "fields": [{"name": "h", "table": "item"}]}],
            "group": None,
        },
        data={"source": {"kind": "parquet", "train": split, "eval": split}, "shuffle_window_blocks": 3},
        train={"max_steps": None},
    )
    truth = {"ids of user taken modulo 1000": 2000, "rows of sequence history cut to the last 3 events": 600}
    for ranks in (two_ranks, four_ranks):
        for counts in zip(*ranks.run(mended_counts, config), strict=True):
            assert dict(sum((Counter(c) for c in counts), Counter())) == truth


def test_files_of_row_groups_too_large_to_hold_are_refused(two_ranks):
    config = loop_config(data={"max_held_rows": 3000})
    with pytest.raises(
        AssertionError, match=r"would hold 4,000 decoded rows: 2 lanes x windows of 4,000 rows(.|\n)*max_held_rows"
    ):
        two_ranks.run(mended_counts, config)
