"""TorchRec's own planner on the same request: its default, its best settings, and its dynamic-programming proposer."""

import time
from dataclasses import dataclass
from typing import Literal

from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, SortBy
from torchrec.distributed.planner.proposers import (
    DynamicProgrammingProposer,
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError

from dlrm_scale.cluster import ClusterSpec, bytes_per_ms
from dlrm_scale.config import SparseOptimizer
from dlrm_scale.sharding.meta_world import bare_collections
from dlrm_scale.sharding.plan import PlanRequest
from dlrm_scale.sharding.sharders import make_sharders

Setting = Literal["default", "best", "dp"]
SETTINGS: tuple[Setting, ...] = ("default", "best", "dp")


@dataclass(frozen=True)
class StockAnswer:
    """`score_ms` is None where TorchRec found no plan."""

    score_ms: float | None
    seconds: float


def stock_plan(request: PlanRequest, setting: Setting, search_seconds: int) -> StockAnswer:
    """`best` are the settings that reference measurements found strongest: greedy without depth first, then uniform and the others,
    placement sorted by cost. `search_seconds` does not limit TorchRec's enumeration."""
    kinds = {
        "default": {},
        "best": {
            "proposer": [GreedyProposer(use_depth=False), UniformProposer(), GreedyProposer(), GridSearchProposer()],
            "partitioner": GreedyPerfPartitioner(sort_by=SortBy.PERF),
        },
        "dp": {"proposer": DynamicProgrammingProposer(), "partitioner": GreedyPerfPartitioner(sort_by=SortBy.PERF)},
    }
    planner = EmbeddingShardingPlanner(
        topology=topology(request.cluster),
        batch_size=request.local_batch_size,
        storage_reservation=FixedPercentageStorageReservation(percentage=request.sharding.storage_reserve),
        constraints={
            name: ParameterConstraints(
                pooling_factors=list(spec.expected_ids_by_feature.values()), compute_kernels=["fused", "dense"]
            )
            for name, spec in request.tables.items()
        },
        stats=[],
        debug=False,
        timeout_seconds=search_seconds,
        **kinds[setting],
    )
    started = time.monotonic()
    try:
        planner.plan(
            bare_collections(request),
            make_sharders(SparseOptimizer(name=request.sparse_optimizer), request.cluster.device),
        )
    except PlannerError:
        return StockAnswer(None, time.monotonic() - started)
    seconds = time.monotonic() - started
    load_ms = [0.0] * request.cluster.num_ranks
    for option in planner._best_plan:
        for shard in option.shards:
            load_ms[shard.rank] += shard.perf.total
    return StockAnswer(max(load_ms), seconds)


def topology(cluster: ClusterSpec) -> Topology:
    bandwidths = {
        "ddr_mem_bw": bytes_per_ms(cluster.host_memory_gb_per_s),
        "intra_host_bw": bytes_per_ms(cluster.intra_host_gb_per_s),
        "inter_host_bw": bytes_per_ms(cluster.inter_host_gb_per_s),
    }
    if cluster.device == "cuda":
        bandwidths["hbm_mem_bw"] = bytes_per_ms(cluster.hbm_gb_per_s)
        bandwidths["hbm_to_ddr_mem_bw"] = bytes_per_ms(cluster.host_link_gb_per_s)
    return Topology(
        world_size=cluster.num_ranks,
        local_world_size=cluster.ranks_per_host,
        compute_device=cluster.device,
        hbm_cap=int(cluster.hbm_bytes_per_rank),
        ddr_cap=int(cluster.host_bytes_per_rank),
        ssd_cap=0,
        bwd_compute_multiplier=cluster.cost_coefficients.backward,
        **bandwidths,
    )
