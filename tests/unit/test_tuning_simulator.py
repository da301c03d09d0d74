"""The simulator: its costs do not add up, in the ways that its description names."""

import pytest

from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.simulator import Simulated, simulate
from dlrm_scale.tuning.space import Space
from tests.support.requests import cluster
from tests.support.tuning import PLANS, tiny_space

SINGLE = {"kind": "categorical"}
KNOBS = {
    "ranks": SINGLE | {"key": "launch.num_ranks", "values": [1, 2, 4]},
    "threads": SINGLE | {"key": "launch.threads_per_rank", "values": [1, 2]},
    "batch": SINGLE | {"key": "train.global_batch_size", "values": [64, 1024]},
    "accumulate": SINGLE | {"key": "train.accumulate_steps", "values": [1, 2]},
    "pipeline": SINGLE | {"key": "train.pipeline", "values": ["sparse_dist", "none"]},
    "precision": SINGLE | {"key": "train.precision", "values": ["fp32", "bf16"]},
    "user": {"kind": "sharding", "tables": ["user"], "values": ["any", "table_wise", "row_wise"]},
    "others": {"kind": "sharding", "tables": ["item", "category", "tag"], "values": ["any", "table_wise"]},
}
BASE = {"ranks": 2, "threads": 1, "batch": 64, "accumulate": 1, "pipeline": "none", "precision": "fp32"} | {
    "user": "table_wise",
    "others": "table_wise",
}


@pytest.fixture(scope="module")
def spaces() -> dict[str, Space]:
    return {device: tiny_space(KNOBS, cluster(device, 4, 4)) for device in ("cpu", "cuda")}


def simulated(space: Space, **changes) -> Simulated:
    job = space.job(space.point({**BASE, **changes}))
    plan = PLANS.plan(job.config, job.cluster)
    return simulate(job, plan, PLANS.dense(job.config, plan.request.local_batch_size, "cpu"))


def test_a_batch_16_times_as_large_takes_less_than_16_times_as_long(spaces):
    for space in spaces.values():
        small, large = simulated(space).step_ms, simulated(space, batch=1024).step_ms
        assert small < large < 8 * small


def test_bf16_pays_on_cuda_only(spaces):
    """The parts that are not of the dense arch stay."""
    ms = {d: [simulated(s, batch=1024, precision=p).step_ms for p in ("fp32", "bf16")] for d, s in spaces.items()}
    assert ms["cuda"][1] < ms["cuda"][0] and ms["cpu"][1] > ms["cpu"][0]


def test_tables_of_one_type_share_a_kernel(spaces):
    for space in spaces.values():
        assert simulated(space, user="row_wise").step_ms > simulated(space).step_ms


def test_threads_beyond_the_cores_do_not_help(spaces):
    cpu = spaces["cpu"]
    alone = [simulated(cpu, ranks=1, batch=1024, threads=n).step_ms for n in (1, 2)]
    beside = [simulated(cpu, ranks=2, batch=1024, threads=n).step_ms for n in (1, 2)]
    assert alone[1] < alone[0] and beside[1] > 0.9 * beside[0]


def test_accumulation_repeats_what_a_micro_batch_costs(spaces):
    for space in spaces.values():
        once, twice = (simulated(space, batch=1024, accumulate=n).step_ms for n in (1, 2))
        assert once < twice < 2 * once


def test_one_rank_exchanges_nothing(spaces):
    """So that the pipeline has only the readers to hide."""
    cuda = spaces["cuda"]
    gain = {
        n: simulated(cuda, ranks=n).step_ms - simulated(cuda, ranks=n, pipeline="sparse_dist").step_ms for n in (1, 4)
    }
    assert gain[4] > gain[1]


def test_more_memory_is_needed_than_the_planner_counts(spaces):
    space = spaces["cuda"]
    job = space.job(Point({**BASE, "batch": 1024}))
    plan = PLANS.plan(job.config, job.cluster)
    counted = max(load.total_device_bytes for load in plan.ranks) / job.cluster.table_bytes_per_rank
    assert simulated(space, batch=1024).needed > 1.1 * counted


def test_the_same_job_takes_the_same_time(spaces):
    assert simulated(spaces["cpu"]) == simulated(spaces["cpu"])
