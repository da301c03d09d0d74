"""The cut backward pass: bitwise the plain one's results, and a bad micro-batch of one rank changes nothing on any."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from dlrm_scale.communication_config import Communication
from dlrm_scale.config import RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.data.open import open_source
from dlrm_scale.errors import DivergedError, RollbackRequested
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.resilience.guards import DENSE, LOOKUPS, LOSS, Guard, NonFinite, fused_kernels
from dlrm_scale.resilience.watchdog import Watchdog
from dlrm_scale.sharding.apply import ShardedModel, shard_model
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.keepers import Keepers
from dlrm_scale.training.monitor import Board
from dlrm_scale.training.optimizers import TrainOptimizer
from dlrm_scale.training.pipelines import make_pipeline
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import this_rank
from dlrm_scale.training.readers import TrainReader
from dlrm_scale.training.trainer import Trainer
from tests.support.configs import tiny_config
from tests.support.twin import BAG_TYPES, case_config, constraint, make_plan
from tools.replay_batch import main as replay_batch

PIPELINES = ("sparse_dist", "none")  # prefetch: test_prefetch_pipeline.py
NUM_BATCHES, BAD = 6, 3  # micro-batches of a run, and the one that goes wrong
ADAGRAD = {"name": "rowwise_adagrad", "lr": 0.1}
State = dict[str, torch.Tensor]


def new_model(config: RunConfig, plan: Plan) -> ShardedModel:
    device = torch.device(plan.request.cluster.device)
    return shard_model(build_model(config, dense_device=device), plan, config, device)


def state_of(model: ShardedModel, optimizer: TrainOptimizer) -> State:
    """Copies of all that a rank holds: its shards of tables and fused states, dense parameters and their states."""
    found: dict[str, Any] = {f"model {name}": value for name, value in model.module.state_dict().items()}
    tables = model.module.embeddings
    kernels = [kernel for tables_of in (tables.ebc, tables.ec) for kernel in fused_kernels(tables_of)]
    found |= {f"iteration {i}": k.iter for i, k in enumerate(kernels)} | {
        f"cpu {i}": k.iter_cpu for i, k in enumerate(kernels)
    }
    for key, state in optimizer.fused.state_dict()["state"].items():
        found |= {f"fused {key} {name}": value for name, value in state.items()}
    for kind, plain in (("dense", optimizer.dense), ("replicated", optimizer.replicated)):
        for i, state in (plain.state_dict()["state"] if plain else {}).items():
            found |= {f"{kind} {i} {name}": value for name, value in state.items()}
    tensors = {}
    for name, value in found.items():
        for i, part in enumerate(value.local_shards() if isinstance(value, ShardedTensor) else [value]):
            tensors[f"{name} {i}"] = torch.as_tensor(getattr(part, "tensor", part)).detach().clone()
    return tensors


def differing(mine: State, other: State) -> list[str]:
    assert len(mine) > 8 and mine.keys() == other.keys()
    return [name for name, value in mine.items() if not torch.equal(value, other[name])]


def batches_of(config: RunConfig, change: str | None) -> Iterator[RecBatch]:
    """The first NUM_BATCHES micro-batches; number BAD is left out, weightless on every rank, or has a NaN on the last rank."""
    rank = this_rank("cpu")
    reader = TrainReader(config, rank, open_source(config.data, config.features, "train", config.seed))
    reader.num_steps = NUM_BATCHES // config.train.accumulate_steps  # all ranks' readers must come to their end
    with reader.batches() as stream:
        for i, batch in enumerate(stream):
            if i == BAD and change == "without":
                continue
            if i == BAD and change == "weightless":
                batch.weights_B.zero_()
            if i == BAD and change == "nan" and rank.index == rank.world_size - 1:
                batch.dense_BF[2, 0] = math.nan
            yield batch


def trained(
    config: RunConfig, plan: Plan, pipeline: str | None, change: str | None = None, overflow: bool = False
) -> tuple[State, list[State], list[NonFinite]]:
    """This rank's state after a run, before and after each dropped micro-batch, and what was found bad.

    pipeline None: the shortest loop there is, without a guard. overflow: a dense gradient of rank 1 is inf at number BAD.
    """
    model = new_model(config, plan)
    optimizer = TrainOptimizer(model, config.train, NUM_BATCHES)
    stream = batches_of(config, change)
    if pipeline is None:
        for batch in stream:
            optimizer.zero_grad()
            loss, _ = model(batch.to(model.device))
            loss.backward()
            optimizer.step()
        return state_of(model, optimizer), [], []
    found: list[NonFinite] = []
    tables = model.module.embeddings
    parameters = [*optimizer.dense_parameters, *optimizer.replicated_tables.values()]
    guard = Guard([tables.ebc, tables.ec], parameters, found.append)
    runner = make_pipeline(pipeline, model, optimizer, model.device, guard.backward)
    number, around = 0, []
    if overflow and dist.get_rank() == 1:
        optimizer.dense_parameters[0].register_hook(lambda g: g * math.inf if number == BAD else g)
    while True:
        before = state_of(model, optimizer) if number == BAD else None
        try:
            runner.progress(stream)
        except StopIteration:
            return state_of(model, optimizer), around, found
        if guard.dropped:
            around = [before, state_of(model, optimizer)]
        number += 1


def parity(config: RunConfig, plan: Plan) -> list[str]:
    """What differs on this rank between the plain loop and the guarded pipelines; and that the run changed anything."""
    plain, _, _ = trained(config, plan, None)
    wrong = []
    for pipeline in PIPELINES:
        guarded, _, found = trained(config, plan, pipeline)
        wrong += [f"{pipeline}: {name}" for name in differing(guarded, plain)] + [str(bad) for bad in found]
    start = new_model(config, plan)
    untrained = state_of(start, TrainOptimizer(start, config.train, NUM_BATCHES))
    moved = sum(not torch.equal(value, untrained[name]) for name, value in plain.items() if name in untrained)
    return wrong if moved > 4 else [*wrong, "nothing was trained"]


@pytest.mark.parametrize("bag_type", BAG_TYPES)
def test_guarded_steps_are_bitwise_plain_steps_for_every_type_of_table(four_ranks, bag_type):
    """Sequence tables rotate through their types too; every second case accumulates."""
    i = BAG_TYPES.index(bag_type)
    config = case_config(bag_type, ("table_wise", "column_wise", "row_wise")[i % 3], ADAGRAD)
    train = config.train.model_copy(update={"accumulate_steps": 1 + i % 2})
    config = config.model_copy(update={"train": train})
    assert four_ranks.run(parity, config, make_plan(config, 4, 2)) == [[]] * 4


def test_guarded_steps_are_bitwise_plain_steps_of_deduplicated_ids(two_ranks):
    config = case_config("row_wise", "row_wise", ADAGRAD)
    train = config.train.model_copy(update={"index_dedup": True, "accumulate_steps": 2})
    config = config.model_copy(update={"train": train})
    assert two_ranks.run(parity, config, make_plan(config, 2, 2)) == [[]] * 2


@pytest.mark.parametrize("sparse", ["adagrad", "sgd"])
def test_guarded_steps_are_bitwise_plain_steps_for_other_fused_optimizers(two_ranks, sparse):
    config = case_config("row_wise", "table_wise", {"name": sparse, "lr": 0.1})
    assert two_ranks.run(parity, config, make_plan(config, 2, 2)) == [[]] * 2


def test_guarded_steps_are_bitwise_plain_steps_in_16_bits_and_a_bad_batch_is_dropped(two_ranks):
    config = mixed_config(all_reduce={"precision": "bf16"})
    sharding = config.sharding.model_copy(update={"communication": Communication(forward="fp16", backward="bf16")})
    config = config.model_copy(update={"sharding": sharding})
    plan = make_plan(config, 2, 2)
    assert two_ranks.run(parity, config, plan) == [[]] * 2
    for result in two_ranks.run(bad_batch, config, plan, "sparse_dist", "nan", "without"):
        assert result["changed"] == [] and result["differs"] == [] and len(result["found"]) == 1


MIXED = {
    "user": constraint("row_wise", 4),
    "tag": constraint("data_parallel", 4),
    "item": constraint("column_wise", 4),
    "category": constraint("table_wise", 4),
}


def mixed_config(accumulate_steps: int = 1, **train: Any) -> RunConfig:
    """Dense Adam, and tables of four types."""
    return tiny_config(
        sharding={"tables": MIXED}, train={"accumulate_steps": accumulate_steps, "sparse": ADAGRAD, **train}
    )


def bad_batch(config: RunConfig, plan: Plan, pipeline: str, change: str | None, instead: str | None) -> dict[str, Any]:
    """With a bad micro-batch: what a drop changed on this rank, what else differs from a run with `instead`, what was found."""
    overflow = change is None
    state, around, found = trained(config, plan, pipeline, change, overflow)
    expected, _, _ = trained(config, plan, pipeline, instead)
    return {"changed": differing(*around), "differs": differing(state, expected), "found": found}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_bad_batch_of_one_rank_is_as_if_it_had_never_been(two_ranks, pipeline):
    config = mixed_config()
    results = two_ranks.run(bad_batch, config, make_plan(config, 2, 2), pipeline, "nan", "without")
    for result in results:
        assert result["changed"] == [] and result["differs"] == []
        [found] = result["found"]
        assert found.seen == {1: [LOSS, LOOKUPS]}
        assert math.isfinite(found.losses[0]) and math.isnan(found.losses[1])
        assert str(found) == "the loss is nan on rank 1"


def test_a_bad_micro_batch_is_left_out_of_its_step(two_ranks):
    """It is the second of two of its step: the first one's gradient must survive it."""
    config = mixed_config(accumulate_steps=2)
    results = two_ranks.run(bad_batch, config, make_plan(config, 2, 2), "sparse_dist", "nan", "weightless")
    for result in results:
        assert result["changed"] != []  # the step's first micro-batch was applied with it, by the dense optimizer
        assert all(
            name.startswith(("dense", "model dense", "replicated", "model embeddings.ebc.embedding_bags.tag"))
            for name in result["changed"]
        )
        # a weightless micro-batch counts as a step of the kernels, a dropped one does not
        assert all(name.startswith(("iteration", "cpu")) for name in result["differs"])


def test_an_overflow_of_a_dense_gradient_alone_is_found(two_ranks):
    config = mixed_config()
    results = two_ranks.run(bad_batch, config, make_plan(config, 2, 2), "sparse_dist", None, "without")
    for result in results:
        assert result["changed"] == [] and result["differs"] == []
        [found] = result["found"]
        assert found.seen == {0: [DENSE], 1: [DENSE]}  # the averaged gradient is all that shows it
        assert str(found) == "a gradient of the dense parameters is not finite on rank 0, 1"


class Poisoned(TrainReader):
    """A training reader whose rank 1 has a NaN in some micro-batches."""

    bad: tuple[int, ...] = ()

    def batches(self, samples_consumed=0):
        from contextlib import contextmanager

        @contextmanager
        def poisoned():
            with super(Poisoned, self).batches(samples_consumed) as stream:
                yield self._poison(stream)

        return poisoned()

    def _poison(self, stream):
        for i, batch in enumerate(stream):
            if i in self.bad and dist.get_rank() == 1:
                batch.dense_BF[2, 1] = math.nan
            yield batch


def train(config: RunConfig, plan: Plan, run_dir: Path, bad: tuple[int, ...]) -> tuple[str, int, list[float], int]:
    """(how it ended, steps, losses, micro-batches skipped)"""
    rank = this_rank("cpu")
    model = new_model(config, plan)
    reader = Poisoned(config, rank, open_source(config.data, config.features, "train", config.seed))
    reader.bad = bad
    keepers = Keepers(Watchdog(rank.index, rank.world_size, 0, 0), run_dir=run_dir)
    trainer = Trainer(config, rank, model, reader, None, Board(None), Progress(None, 0), keepers)
    try:
        trainer.train()
        ended = "well"
    except (DivergedError, RollbackRequested) as e:
        ended = f"{type(e).__name__}: {e}"
    return ended, trainer.result.num_steps, trainer.result.losses, trainer.result.skipped_micro_batches


def test_skip_counts_and_goes_on_until_too_many_come_in_a_row(two_ranks, tmp_path):
    config = mixed_config(nonfinite="skip", max_skipped=2, max_steps=15)
    plan = make_plan(config, 2, 2)
    for result in two_ranks.run(train, config, plan, tmp_path, (4, 5, 8, 9)):
        assert result[0] == "well" and result[1] == 15 and result[3] == 4
        assert len(result[2]) == 3 and all(map(math.isfinite, result[2]))
    assert sorted(p.name for p in (tmp_path / "bad_batches").iterdir()) == [f"step_{s}_rank_1.pt" for s in (4, 5, 8, 9)]
    for result in two_ranks.run(train, config, plan, tmp_path / "again", (4, 5, 6)):
        assert result[0].startswith("DivergedError: the loss is nan on rank 1 in step 6, after 2 in a row")


@pytest.mark.parametrize(("policy", "error"), [("stop", "DivergedError"), ("rollback", "RollbackRequested")])
def test_stop_and_rollback_end_every_rank_and_keep_the_batch_for_a_replay(two_ranks, tmp_path, capsys, policy, error):
    config = mixed_config(nonfinite=policy)
    results = two_ranks.run(train, config, make_plan(config, 2, 2), tmp_path, (6,))
    kept = tmp_path / "bad_batches" / "step_6_rank_1.pt"
    for ended, num_steps, _, _ in results:
        assert ended.startswith(f"{error}: the loss is nan on rank 1 in step 6") and str(kept) in ended
        assert num_steps == 6
    assert replay_batch([str(kept)]) == 1
    shown = capsys.readouterr().out
    assert "step 6, rank 1 of 2" in shown and "first not finite: dense feature price: rows 2" in shown
