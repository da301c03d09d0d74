"""Saved under any plan and number of ranks, loaded under any other: every table, fused and dense optimizer state."""

from collections.abc import Iterator

import pytest

from tests.support.checkpoints import load_each, plan_of, save_stamped
from tests.support.ranks import RankPool
from tests.support.twin import BAG_TYPES, case_config

# beside each type of the bags' tables, one of the sequences'
SEQUENCE_TYPE = dict(zip(BAG_TYPES, ("table_wise", "column_wise", "row_wise") * 3, strict=False))
WORLDS = {1: 1, 2: 2, 4: 2}  # ranks, and of them on one host


def config_of(optimizer: str, bag_type: str):
    # grid_shard and pooling: mean do not go together, so one configuration for all types sums
    config = case_config("grid_shard", "table_wise", {"name": optimizer})
    return config.model_copy(update={"sharding": case_config(bag_type, "table_wise", {"name": optimizer}).sharding})


@pytest.fixture(scope="module")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def pools(one_rank, two_ranks, four_ranks) -> dict[int, RankPool]:
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


def check_matrix(pools, tmp_path, optimizer: str, save_on: tuple[int, ...], load_on: tuple[int, ...]) -> None:
    config = config_of(optimizer, "row_wise")

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


@pytest.mark.timeout(300)
def test_every_plan_loads_what_every_plan_saved(pools, tmp_path):
    """By row-wise Adagrad, whose state changes shape with the columns' cuts."""
    check_matrix(pools, tmp_path, "rowwise_adagrad", save_on=(1, 2, 4), load_on=(1, 2, 4))


@pytest.mark.parametrize("optimizer", ["adagrad", "sgd"])
def test_other_optimizers_states_move_between_plans(pools, tmp_path, optimizer):
    check_matrix(pools, tmp_path, optimizer, save_on=(2,), load_on=(4,))


def test_what_is_missing_or_too_much_is_listed_at_once(pools, tmp_path):
    saved = config_of("adagrad", "row_wise")
    path = str(tmp_path / "saved")
    pools[2].run(save_stamped, saved, plan_of(saved, 2, 2, "row_wise", "table_wise"), path)
    other = saved.model_copy(
        update={
            "train": saved.train.model_copy(update={"sparse": saved.train.sparse.model_copy(update={"name": "sgd"})})
        }
    )
    deeper = other.model_copy(update={"model": other.model.model_copy(update={"head_hidden": (16, 8)})})
    plan = plan_of(deeper, 2, 2, "row_wise", "table_wise")
    for wrong in pools[2].run(load_each, deeper, plan, [path]):
        faults = "\n".join(wrong[path])
        assert "tables/user/sum: in the checkpoint, not in this model" in faults
        assert "tables/item/sum: in the checkpoint, not in this model" in faults
        assert "not in the checkpoint" in faults and "dense/arch" in faults
