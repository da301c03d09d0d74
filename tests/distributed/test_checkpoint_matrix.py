"""Saved under any plan and number of ranks, loaded under any other: every table, fused and dense optimizer state."""

from collections.abc import Iterator

import pytest

from dlrm_scale.config import PLAIN_SPARSE_OPTIMIZERS
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


@pytest.mark.parametrize("optimizer", PLAIN_SPARSE_OPTIMIZERS)
def test_every_plan_loads_what_every_plan_saved(pools, tmp_path, optimizer):
    # row-wise Adagrad has the state that changes shape with the columns' cuts; for the others two worlds tell
    worlds = WORLDS if optimizer == "rowwise_adagrad" else {2: 2, 4: 2}
    config = config_of(optimizer, "row_wise")
    cases = {
        f"{bag_type} on {n}": plan_of(config, n, WORLDS[n], bag_type, SEQUENCE_TYPE[bag_type])
        for bag_type in BAG_TYPES
        for n in worlds
    }
    for name, plan in cases.items():
        pools[len(plan.ranks)].run(save_stamped, config, plan, str(tmp_path / name))
    paths = [str(tmp_path / name) for name in cases]
    for name, plan in cases.items():
        for wrong in pools[len(plan.ranks)].run(load_each, config, plan, paths):
            assert set(wrong) == set(paths)
            assert {path: faults for path, faults in wrong.items() if faults} == {}, f"loaded as {name}"


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
