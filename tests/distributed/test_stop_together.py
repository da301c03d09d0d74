"""A signal to one rank ends all ranks' training after the same step, without a collective of its own."""

import os
import signal
from pathlib import Path

import torch

from dlrm_scale.config import RunConfig
from dlrm_scale.data.open import open_source
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.resilience.audit import audit
from dlrm_scale.resilience.preemption import Preemption
from dlrm_scale.resilience.watchdog import Watchdog
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.keepers import Keepers
from dlrm_scale.training.monitor import Board
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import this_rank
from dlrm_scale.training.readers import EvalReader, TrainReader
from dlrm_scale.training.run import open_account
from dlrm_scale.training.trainer import Trainer
from tests.support.configs import tiny_config
from tests.support.twin import make_plan


class SignalAt(Progress):
    """Shows nothing; sends this process a signal after a step."""

    def __init__(self, step: int | None) -> None:
        super().__init__(None, 0)
        self.step = step

    def advance(self, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def train(config: RunConfig, plan: Plan, run_dir: Path, at_by_rank: list[int | None]) -> tuple[int, bool, bool]:
    """(steps, preempted, evaluated) on this rank, which is signalled after its step of `at_by_rank`."""
    rank = this_rank("cpu")
    model = shard_model(
        build_model(config, dense_device=torch.device("cpu")),
        plan,
        config,
        torch.device("cpu"),
    )
    eval_reader = EvalReader(config, rank, open_source(config.data, config.features, "eval", config.seed))
    handler = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with Preemption() as preemption:
        source = open_source(config.data, config.features, "train", config.seed)
        reader = TrainReader(config, rank, source, preemption)
        account = open_account(run_dir, rank, reader, 0)
        progress = SignalAt(at_by_rank[rank.index])
        keepers = Keepers(Watchdog(rank.index, rank.world_size, 0, 0), account)
        result = Trainer(config, rank, model, reader, eval_reader, Board(None), progress, keepers).train()
        account.close()
    signal.signal(signal.SIGTERM, handler[0]), signal.signal(signal.SIGUSR1, handler[1])
    return result.num_steps, result.preempted, bool(result.eval_metrics)


def test_all_ranks_stop_after_one_and_the_same_step(two_ranks, tmp_path):
    config = tiny_config(train={"max_steps": 60, "accumulate_steps": 2}, data={"prefetch_batches": 2})
    plan = make_plan(config, 2, 2)
    for number, signals in enumerate(([None, 5], [9, None], [3, 4])):
        results = two_ranks.run(train, config, plan, tmp_path / str(number), signals)
        (steps, preempted, evaluated), other = results
        first = min(at for at in signals if at)
        assert (steps, preempted) == other[:2] and preempted and not evaluated
        assert (
            first < steps <= first + 8
        )  # what was read ahead: the queue, the reader's next step, the pipeline's batches
        result = audit(tmp_path / str(number) / "account")
        assert result.faults == [] and result.num_steps == steps and result.num_samples == steps * 64


def test_a_signal_behind_the_last_agreement_changes_nothing(two_ranks, tmp_path):
    config = tiny_config(train={"max_steps": 10})
    results = two_ranks.run(train, config, make_plan(config, 2, 2), tmp_path, [10, None])
    assert results == [(10, False, True), (10, False, False)]
