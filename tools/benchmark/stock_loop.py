"""DLRM and DLRM-DCNv2 from TorchRec's own parts alone, as its public example trains them: eager fp32, batches in memory.

Its model, its default sharders and planner, `DistributedModelParallel`, `TrainPipelineSparseDist`. Nothing is read, checked,
measured or logged but the time of each step.
"""

import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from dlrm_scale.config import DCNv2Config, RunConfig
from dlrm_scale.data.open import open_source
from dlrm_scale.meta import META
from dlrm_scale.training.monitor import peak_memory_bytes
from dlrm_scale.training.ranks import Rank, process_group, this_rank
from tools.benchmark.roofline import measure_peaks
from tools.benchmark.train_ranks import KEPT_BATCHES, InMemory, RankRun


def measure_stock(tell: Callable[[str], Any], config: RunConfig, threads: int) -> RankRun:
    """As one of torchrun's ranks."""
    torch.set_num_threads(threads)
    rank = this_rank(config.device)
    with process_group(rank):
        tell("training")
        step_ms = _train(config, rank)
        warm = step_ms[config.log.warmup_steps :]
        samples_per_s = config.train.global_batch_size * len(warm) / sum(warm) * 1e3
        memory = peak_memory_bytes(rank.device)
        tell("measuring the machine")
        return RankRun(samples_per_s, warm, {}, memory, measure_peaks(rank.device))


def _train(config: RunConfig, rank: Rank) -> list[float]:
    torch.manual_seed(config.seed)
    batches = _batches(config, rank)
    model = _model(config, rank)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    rates = config.train.dense
    optimizer = CombinedOptimizer(
        [
            model.fused_optimizer,
            KeyedOptimizerWrapper(dense, lambda p: torch.optim.Adam(p, lr=rates.lr, eps=rates.eps)),
        ]
    )
    pipeline = TrainPipelineSparseDist(model, optimizer, rank.device, execute_all_batches=True)
    model.train()
    total, step_ms = config.train.max_steps or 0, []
    stream = islice(cycle(batches), total)
    dist.barrier()
    for _ in range(total):
        started = time.perf_counter()
        pipeline.progress(stream)
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
        step_ms.append((time.perf_counter() - started) * 1e3)
    return step_ms


def _batches(config: RunConfig, rank: Rank) -> list[Batch]:
    reader = InMemory(config, rank, open_source(config.data, config.features, "train", config.seed))
    with reader.batches() as batches:
        kept = list(islice(batches, KEPT_BATCHES))
    return [Batch(batch.dense_BF, batch.bags, batch.labels_BT.squeeze(1).int()) for batch in kept]


def _model(config: RunConfig, rank: Rank) -> DistributedModelParallel:
    schema, arch = config.features, config.model
    dim = next(iter(schema.tables.values())).embedding_dim
    tables = [
        EmbeddingBagConfig(
            name=name,
            embedding_dim=dim,
            num_embeddings=table.num_embeddings,
            feature_names=list(schema.features_of(name)),
        )
        for name, table in schema.tables.items()
    ]
    parts: dict[str, Any] = {
        "embedding_bag_collection": EmbeddingBagCollection(tables, device=META),
        "dense_in_features": len(schema.dense),
        "dense_arch_layer_sizes": [*arch.bottom_hidden, dim],
        "over_arch_layer_sizes": [*arch.top_hidden, 1],
        "dense_device": rank.device,
    }
    if isinstance(arch, DCNv2Config):
        model = DLRM_DCN(**parts, dcn_num_layers=arch.cross_layers, dcn_low_rank_dim=arch.cross_rank)
    else:
        model = DLRM(**parts)
    train = DLRMTrain(model)
    apply_optimizer_in_backward(
        RowWiseAdagrad,
        model.sparse_arch.parameters(),
        {"lr": config.train.sparse.lr, "eps": config.train.sparse.eps},
    )
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            local_world_size=rank.ranks_per_host, world_size=rank.world_size, compute_device=rank.device.type
        ),
        batch_size=config.train.global_batch_size // rank.world_size,
        stats=[],
    )
    plan = planner.collective_plan(train, get_default_sharders(), dist.GroupMember.WORLD)
    return DistributedModelParallel(train, device=rank.device, plan=plan)
