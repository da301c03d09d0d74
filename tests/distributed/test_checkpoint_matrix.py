"""Saved under any plan and number of ranks, loaded under any other: every table, fused and dense optimizer state."""

from collections.abc import Iterator

import pytest

from dlrm_scale.config import DenseOptimizer, LogisticConfig, RunConfig
from tests.support.checkpoints import load_each, plan_of, save_stamped
from tests.support.ranks import RankPool
from tests.support.twin import BAG_TYPES, case_config

# beside each type of the bags' tables, one of the sequences'
SEQUENCE_TYPE = dict(zip(BAG_TYPES, ("table_wise", "column_wise", "row_wise") * 3, strict=False))
WORLDS = {1: 1, 2: 2, 4: 2}  # ranks, and of them on one host


def config_of(optimizer: str, dense: str = "adam") -> RunConfig:
    """grid_shard and pooling: mean do not go together, so all tables sum. The dense arch is small: there are many loads."""
    config = case_config("grid_shard", "table_wise", {"name": optimizer})
    train = config.train.model_copy(update={"dense": DenseOptimizer(name=dense)})
    return config.model_copy(update={"model": LogisticConfig(), "train": train})


@pytest.fixture(scope="module")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def pools(one_rank, two_ranks, four_ranks) -> dict[int, RankPool]:
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


def check_matrix(pools, tmp_path, optimizer: str, save_on: tuple[int, ...], load_on: tuple[int, ...]) -> None:
    config = config_of(optimizer)

    def cases(worlds: tuple[int, ...]):
        return [
            (f"{kind} on {n}", n, plan_of(config, n, WORLDS[n], kind, SEQUENCE_TYPE[kind]))
            for kind in BAG_TYPES
            for n in worlds
        ]

    for name, num_ranks, plan in cases(save_on):
        pools[num_ranks].run(save_stamped, config, plan, str(tmp_path / name), timeout_seconds=200)
    paths = [str(tmp_path / name) for name, _, _ in cases(save_on)]
    for name, num_ranks, plan in cases(load_on):
        for wrong in pools[num_ranks].run(load_each, config, plan, paths):
            assert set(wrong) == set(paths)
            assert {path: faults for path, faults in wrong.items() if faults} == {}, f"loaded as {name}"


@pytest.mark.timeout(600)
def test_every_plan_loads_what_every_plan_saved(pools, tmp_path):
    """By row-wise Adagrad, whose state changes shape with the columns' cuts."""
    check_matrix(pools, tmp_path, "rowwise_adagrad", save_on=(1, 2, 4), load_on=(1, 2, 4))


@pytest.mark.parametrize("optimizer", ["adagrad", "sgd"])
def test_other_optimizers_states_move_between_plans(pools, tmp_path, optimizer):
    check_matrix(pools, tmp_path, optimizer, save_on=(2,), load_on=(4,))


def test_what_is_missing_or_too_much_is_listed_at_once(pools, tmp_path):
    path = str(tmp_path / "saved")
    config, other = config_of("adagrad"), config_of("sgd", "adagrad")
    pools[2].run(save_stamped, config, plan_of(config, 2, 2, "row_wise", "table_wise"), path)
    for wrong in pools[2].run(load_each, other, plan_of(other, 2, 2, "row_wise", "table_wise"), [path]):
        surplus = [line for line in wrong[path] if line.endswith(": in the checkpoint, not in this model")]
        assert any(line.startswith("dense_optimizer/") and "/exp_avg_sq:" in line for line in surplus)
        missing = [line for line in wrong[path] if line.endswith(": not in the checkpoint")]
        assert missing and all(line.startswith("dense_optimizer/") and "/sum:" in line for line in missing)
        assert {
            f"tables/{t}/sum: in the checkpoint, not in this model" for t in ("user", "tag", "item", "category")
        } <= set(surplus)
