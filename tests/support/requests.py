"""Random PlanRequests, and how TorchRec would be asked the same."""

import random

from dlrm_scale.cluster import ClusterSpec, CostCoefficients, Figure
from dlrm_scale.config import SEQUENCE_SHARDING_TYPES, ShardingConfig, TableSharding
from dlrm_scale.sharding.groups import SHARDING_TYPES
from dlrm_scale.sharding.plan import PlanRequest, TableSpec

ROWS = (1, 2, 3, 7, 23, 24, 100, 1_001, 1_000_003, 1_000_000_007)
DIMS = (4, 8, 12, 32, 60, 64, 96, 100, 128, 132, 192, 256, 384, 512)
CLUSTERS = {
    "2 cpu ranks": ("cpu", 2, 2),
    "4 cpu ranks on 2": ("cpu", 4, 2),
    "8 on 1": ("cuda", 8, 8),
    "16 on 2": ("cuda", 16, 8),
    "24 on 3": ("cuda", 24, 8),
}


def cluster(device: str, num_ranks: int, ranks_per_host: int, **fields: CostCoefficients) -> ClusterSpec:
    """Bandwidths of one device each, so that a mix-up of two shows."""
    values = {"host_memory_gb": 900, "host_memory_gb_per_s": 190, "intra_host_gb_per_s": 310, "inter_host_gb_per_s": 23}
    if device == "cuda":
        values |= {"hbm_gb": 80, "hbm_gb_per_s": 2_900, "host_link_gb_per_s": 47}
    figures = {name: Figure(value=value, source="test") for name, value in values.items()}
    return ClusterSpec(device=device, num_ranks=num_ranks, ranks_per_host=ranks_per_host, **figures, **fields)


def random_request(seed: int, machines: ClusterSpec, num_tables: int = 12, constrained: bool = True) -> PlanRequest:
    """Tables of both collections; with `constrained`, some have constraints that narrow, or widen to grid_shard."""
    draw = random.Random(seed)
    tables, constraints = {}, {}
    sequence_dim = draw.choice(DIMS)  # one for all: an EmbeddingCollection needs it
    for i in range(num_tables):
        name, collection = f"t{i}", draw.choice(("bags", "bags", "sequences"))
        tables[name] = TableSpec(
            collection=collection,
            num_embeddings=draw.choice(ROWS),
            embedding_dim=sequence_dim if collection == "sequences" else draw.choice(DIMS),
            data_type=draw.choice(("fp32", "fp16")),
            pooling="mean" if collection == "bags" and draw.random() < 0.2 else "sum",
            expected_ids_by_feature={
                f"{name}_f{j}": draw.choice((0.0, 0.3, 1.0, draw.uniform(0, 40))) for j in range(draw.randint(1, 4))
            },
        )
        if constrained and draw.random() < 0.6:
            constraints[name] = _random_constraint(draw, tables[name], machines.device)
    return request_of(
        tables,
        machines,
        constraints,
        local_batch_size=draw.choice((1, 3, 512, 4_097)),
        sparse_optimizer="rowwise_adagrad",
    )


def request_of(
    tables: dict[str, TableSpec],
    machines: ClusterSpec,
    constraints: dict[str, TableSharding] | None = None,
    local_batch_size: int = 512,
    sparse_optimizer: str = "rowwise_adagrad",
) -> PlanRequest:
    return PlanRequest(
        tables=tables,
        cluster=machines,
        local_batch_size=local_batch_size,
        sparse_optimizer=sparse_optimizer,
        num_dense_parameters=0,
        dense_optimizer="adam",
        dense_activation_bytes=0,
        sharding=ShardingConfig(tables=constraints or {}),
    )


def _random_constraint(draw: random.Random, spec: TableSpec, device: str) -> TableSharding:
    types = SEQUENCE_SHARDING_TYPES if spec.collection == "sequences" else SHARDING_TYPES
    if spec.pooling == "mean":
        types = tuple(t for t in types if t != "grid_shard")
    kernels = ("fused",) if device == "cpu" else ("fused", "fused_uvm", "fused_uvm_caching")
    fits = [width for width in range(4, spec.embedding_dim + 1, 4) if spec.embedding_dim % width == 0]
    factors = {"cache_load_factors": (draw.uniform(0.01, 1),)} if draw.random() < 0.5 else {}
    return TableSharding(
        types=draw.choice((None, types, tuple(draw.sample(types, 2)))),
        kernels=draw.choice((None, tuple(draw.sample(kernels, draw.randint(1, len(kernels)))))),
        min_partition=draw.choice((None, draw.choice(fits))),
        **factors,
    )
