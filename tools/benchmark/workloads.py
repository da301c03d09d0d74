"""Random planning problems: log-uniform rows, mixed widths, log-normal pooling.

`even`: pooling exp(N(1, 1)) on H100-like ranks, where tables are many and alike and good placement is easy. `skewed`: exp(N(2, 1.5)) on
TorchRec's default topology (V100 memory, 12.5 GiB/s between hosts), where a few tables decide.
"""

from typing import Literal

import numpy as np

from dlrm_scale.cluster import ClusterSpec, Figure
from dlrm_scale.config import ShardingConfig, TableSharding
from dlrm_scale.sharding.bound import choice_totals
from dlrm_scale.sharding.options import OptionSet, enumerate_options
from dlrm_scale.sharding.plan import PlanRequest, TableSpec
from dlrm_scale.sharding.planner import prepare

LOCAL_BATCH_SIZE = 4096
RANKS_PER_HOST = 8
DIMS = (16, 32, 64, 128, 256)
LOOSE_HBM_GB = 1e4
Workload = Literal["even", "skewed"]
POOLING = {"even": (1.0, 1.0), "skewed": (2.0, 1.5)}  # mean and deviation of its logarithm
GIB = 2**30 / 1e9
BANDWIDTHS_GB_PER_S = {  # HBM, host memory, link of the two, within a host, between hosts
    "even": (3350, 40, 64, 450, 50),
    "skewed": (897 * GIB, 51 * GIB, 32 * GIB, 600 * GIB, 12.5 * GIB),
}


def random_request(num_tables: int, num_ranks: int, seed: int, workload: Workload = "even") -> PlanRequest:
    """fp32 bag tables with SGD (no optimizer state, as TorchRec's planner counts it), in ample HBM."""
    rng = np.random.default_rng(seed)
    rows = 10 ** rng.uniform(3, np.log10(2e7), num_tables)
    dims = rng.choice(DIMS, num_tables)
    pooling = np.exp(rng.normal(*POOLING[workload], num_tables))
    names = [f"table_{i:04}" for i in range(num_tables)]
    tables = {
        name: TableSpec(
            collection="bags",
            num_embeddings=int(rows[i]),
            embedding_dim=int(dims[i]),
            data_type="fp32",
            pooling="sum",
            expected_ids_by_feature={name: float(pooling[i])},
        )
        for i, name in enumerate(names)
    }
    in_hbm = TableSharding(kernels=("fused",))
    return PlanRequest(
        tables=tables,
        cluster=_cluster(num_ranks, workload),
        local_batch_size=LOCAL_BATCH_SIZE,
        sparse_optimizer="sgd",
        num_dense_parameters=0,
        dense_optimizer="sgd",
        dense_activation_bytes=0,
        sharding=ShardingConfig(tables=dict.fromkeys(names, in_hbm), storage_reserve=0.0, search_seconds=3600.0),
    )


def filled(request: PlanRequest, fill: float) -> PlanRequest:
    """The request with so little HBM that the least bytes of all its tables are `fill` of all ranks' together."""
    options = enumerate_options(request, column_widths="stock")
    prepared = prepare(request, options)
    totals = choice_totals(prepared.problem, prepared.cutter)
    least = float(np.minimum.reduceat(totals.bytes_N2[:, 0], totals.start_U).sum())
    hbm_gb = least / fill / request.cluster.num_ranks / 1e9
    hbm = request.cluster.hbm_gb.model_copy(update={"value": hbm_gb})
    return request.model_copy(update={"cluster": request.cluster.model_copy(update={"hbm_gb": hbm})})


def stock_options(request: PlanRequest) -> OptionSet:
    """What TorchRec's enumerator offers, so that both search the same space."""
    return enumerate_options(request, column_widths="stock")


def _cluster(num_ranks: int, workload: Workload) -> ClusterSpec:
    def figure(value: float) -> Figure:
        return Figure(value=value, source=f"guess: workload {workload}, for comparing planners")

    hbm, host, link, intra, inter = map(figure, BANDWIDTHS_GB_PER_S[workload])
    return ClusterSpec(
        device="cuda",
        num_ranks=num_ranks,
        ranks_per_host=min(RANKS_PER_HOST, num_ranks),
        hbm_gb=figure(LOOSE_HBM_GB),
        host_memory_gb=figure(2000),
        hbm_gb_per_s=hbm,
        host_memory_gb_per_s=host,
        host_link_gb_per_s=link,
        intra_host_gb_per_s=intra,
        inter_host_gb_per_s=inter,
    )
