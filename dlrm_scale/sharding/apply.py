"""Turns a plan and a model into a `DistributedModelParallel`; the only module that knows it."""

import hashlib
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import CacheParams, EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from dlrm_scale.config import RunConfig, SparseOptimizer
from dlrm_scale.meta import META
from dlrm_scale.sharding.local_tables import refuse_empty_kernels
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.sharding.sharders import make_sharders

ShardedModel = DistributedModelParallel  # what the trainer calls it

MODULE_PATHS = {"bags": "embeddings.ebc", "sequences": "embeddings.ec"}  # of RankingModel
INIT_BLOCK_ROWS = 65_536
SENT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def to_torchrec(plan: Plan, device_type: str | None = None) -> ShardingPlan:
    """The plan in TorchRec's own terms, for modules on `device_type` (None: the cluster's)."""
    cluster = plan.request.group
    device_type = device_type or cluster.device
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    for name, table in plan.tables.items():
        spec = None
        if table.sharding_type != "data_parallel":
            spec = EnumerableShardingSpec(
                [
                    ShardMetadata(
                        shard_offsets=[s.row, s.column],
                        shard_sizes=[s.num_rows, s.num_columns],
                        placement=f"rank:{s.rank}/{_device_of(s.rank, device_type, cluster.ranks_per_host)}",
                    )
                    for s in table.shards
                ]
            )
        path = MODULE_PATHS[plan.request.tables[name].collection]
        modules.setdefault(path, EmbeddingModuleShardingPlan())[name] = ParameterSharding(
            sharding_type=table.sharding_type,
            compute_kernel=table.compute_kernel,
            ranks=list(table.ranks),
            sharding_spec=spec,
            cache_params=None if table.cache_load_factor is None else CacheParams(load_factor=table.cache_load_factor),
        )
    return ShardingPlan(modules)


def _device_of(rank: int, device_type: str, ranks_per_host: int) -> str:
    return f"cuda:{rank % ranks_per_host}" if device_type == "cuda" else device_type


def shard_model(model: nn.Module, plan: Plan, config: RunConfig, device: torch.device) -> ShardedModel:
    """Shards `model`'s collections (tables on meta) by `plan` and replicates the rest; needs the process group.

    Every table starts with the same values under any plan and world size: see `initialise_tables`.

    Raises:
        ConfigError: the device has no such optimizer.
        PlanError: on a CPU, a kernel of this rank would hold no row.
    """
    train, communication = config.train, config.sharding.communication
    prefetch = train.pipeline == "prefetch" and device.type == "cuda"
    sharded = DistributedModelParallel(
        model,
        device=device,
        plan=to_torchrec(plan),
        sharders=make_sharders(train.sparse, device.type, communication, prefetch, train.index_dedup),
        init_parameters=False,
        data_parallel_wrapper=DefaultDataParallelWrapper(bucket_cap_mb=train.all_reduce.bucket_mb),
    )
    if device.type == "cpu":
        refuse_empty_kernels(sharded, dist.get_rank())
    if train.all_reduce.precision != "fp32":
        sharded._dmp_wrapped_module.register_comm_hook(SENT_DTYPES[train.all_reduce.precision], _average_rounded)
    initialise_tables(sharded, plan, config.seed)
    return sharded


def _average_rounded(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket of gradients in `dtype`. Torch 2.13's own hooks do the same, but refuse bf16 on gloo, which has it."""
    sent = bucket.buffer().to(dtype).div_(dist.get_world_size())
    reduced = dist.all_reduce(sent, async_op=True).get_future()
    return reduced.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def shard_on_meta(model: nn.Module, plan: Plan, optimizer: SparseOptimizer) -> ShardedModel:
    """What `shard_model` builds on this rank of a `meta_world`, without memory: collections and tables on meta."""
    return DistributedModelParallel(
        model,
        device=META,
        plan=to_torchrec(plan, "meta"),
        sharders=make_sharders(optimizer, plan.request.cluster.device),
        init_parameters=False,
        init_data_parallel=False,
    )


@torch.no_grad()
def initialise_tables(sharded: ShardedModel, plan: Plan, seed: int) -> None:
    """Fills each local shard with its part of a table that is a pure function of (seed, table's name).

    Uniform in +-sqrt(1 / rows), TorchRec's own default. Drawn by blocks of rows, each from a generator of its own, so that
    a rank draws only the blocks its rows lie in. CPU and CUDA draw different numbers.
    """
    state = sharded.module.state_dict()
    for name, spec in plan.request.tables.items():
        path = MODULE_PATHS[spec.collection]
        inner = "embedding_bags" if spec.collection == "bags" else "embeddings"
        weight = state[f"{path}.{inner}.{name}.weight"]
        if isinstance(weight, ShardedTensor):
            for shard in weight.local_shards():
                row, column = shard.metadata.shard_offsets
                fill_shard(shard.tensor, name, row, column, spec.num_embeddings, spec.embedding_dim, seed)
        else:
            fill_shard(weight, name, 0, 0, spec.num_embeddings, spec.embedding_dim, seed)
    if dist.is_initialized():
        dist.barrier()


def fill_shard(
    shard: torch.Tensor, table: str, row: int, column: int, num_embeddings: int, embedding_dim: int, seed: int
) -> None:
    """Writes the part of a table (see `initialise_tables`) that begins at (row, column) and is as large as `shard`."""
    bound = math.sqrt(1 / num_embeddings)
    num_rows, num_columns = shard.shape
    # one buffer for all blocks: with one for each, the allocator kept 150 MB of them
    drawn = torch.empty(min(INIT_BLOCK_ROWS, num_embeddings), embedding_dim, device=shard.device)
    for block in range(row // INIT_BLOCK_ROWS, math.ceil((row + num_rows) / INIT_BLOCK_ROWS)):
        start = block * INIT_BLOCK_ROWS
        rows_in_block = min(INIT_BLOCK_ROWS, num_embeddings - start)
        digest = hashlib.sha256(f"{seed}/{table}/{block}".encode()).digest()
        generator = torch.Generator(device=shard.device).manual_seed(int.from_bytes(digest[:7], "big"))
        values = drawn[:rows_in_block].uniform_(-bound, bound, generator=generator)
        first, last = max(row, start), min(row + num_rows, start + rows_in_block)
        shard[first - row : last - row].copy_(values[first - start : last - start, column : column + num_columns])
