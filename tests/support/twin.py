"""The plain twin that sharded models must equal: one process, plain torch, the concatenated global batch."""

import copy
import math
from typing import Any, get_args

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from dlrm_scale.cluster import this_cluster
from dlrm_scale.config import BagShardingType, RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.data.loader import Reader, agree_alone, batches
from dlrm_scale.data.open import open_source
from dlrm_scale.data.order import Order
from dlrm_scale.models.ranking_model import RankingModel, build_model
from dlrm_scale.sharding.apply import MODULE_PATHS, fill_shard, shard_model
from dlrm_scale.sharding.plan import Plan, plan_request
from dlrm_scale.sharding.planner import find_plan
from dlrm_scale.training.optimizers import TrainOptimizer
from tests.support.configs import tiny_config

BAG_TYPES = get_args(BagShardingType)
NUM_STEPS = 3
RATE_FACTORS = (0.5, 1.0, 1.0)  # a warm-up of two steps


def constraint(sharding_type: str, min_partition: int) -> dict[str, Any]:
    by_column = sharding_type in ("column_wise", "table_column_wise", "grid_shard")
    return {"types": [sharding_type], "min_partition": min_partition if by_column else None}


def case_config(bag_type: str, sequence_type: str, sparse: dict, data_type: str = "fp32") -> RunConfig:
    """Bag tables 256 wide (grid_shard splits columns over hosts in blocks of 128), sequence tables 32."""
    tag_pooling = "sum" if bag_type == "grid_shard" else "mean"
    tables = {
        "user": {"num_embeddings": 500, "embedding_dim": 256},
        "tag": {"num_embeddings": 101, "embedding_dim": 256, "pooling": tag_pooling},
        "item": {"num_embeddings": 303, "embedding_dim": 32},
        "category": {"num_embeddings": 20, "embedding_dim": 32},
    }
    tables = {name: table | {"data_type": data_type} for name, table in tables.items()}
    constraints = {name: constraint(bag_type, 128) for name in ("user", "tag")}
    constraints |= {name: constraint(sequence_type, 16) for name in ("item", "category")}
    return tiny_config(
        features={"tables": tables},
        sharding={"tables": constraints},
        train={
            "sparse": sparse,
            "dense": {"name": "sgd", "lr": 0.1},
            "schedule": {"warmup_steps": 2},
        },
    )


def make_plan(config: RunConfig, world_size: int, ranks_per_host: int, device: str = "cpu") -> Plan:
    return find_plan(plan_request(config, this_cluster(world_size, ranks_per_host, device), 0), num_rounds=100).plan


def global_batches(config: RunConfig, world_size: int, rank: int) -> list[RecBatch]:
    """NUM_STEPS batches of one rank; of world size 1 they are the global ones."""
    source = open_source(config.data, config.features, "train", config.seed)
    lanes = config.data.lanes // world_size
    order = Order(
        source,
        lanes=config.data.lanes,
        global_batch_size=config.train.global_batch_size,
        shuffle_window_blocks=1,
        seed=0,
    )
    reader = Reader(source, order, range(rank * lanes, (rank + 1) * lanes))
    local = config.train.global_batch_size // world_size
    stream = batches(reader.steps(0), config.features, micro_batch_size=local, accumulate_steps=1, agree=agree_alone)
    return [next(stream) for _ in range(NUM_STEPS)]


class Twin:
    """The model on one process: tables as plain parameters, stepped by FBGEMM's documented rules."""

    def __init__(self, config: RunConfig, plan: Plan, device: torch.device) -> None:
        self.config, self.plan = config, plan
        self.model: RankingModel = build_model(config, table_device=device, dense_device=device)
        self.tables = {}
        for name, spec in plan.request.tables.items():
            inner = "embedding_bags" if spec.collection == "bags" else "embeddings"
            self.tables[name] = self.model.get_parameter(f"{MODULE_PATHS[spec.collection]}.{inner}.{name}.weight")
            fill_shard(self.tables[name].data, name, 0, 0, spec.num_embeddings, spec.embedding_dim, config.seed)
        self.dense = torch.optim.SGD(
            [p for n, p in self.model.named_parameters() if not n.startswith("embeddings.")], lr=0.1
        )
        self.num_steps = 0
        self.sums: dict[tuple[str, int], torch.Tensor] = {}

    def step(self, batch: RecBatch) -> torch.Tensor:
        loss, predictions = self.model(batch)
        self.model.zero_grad()
        loss.backward()
        factor = RATE_FACTORS[self.num_steps]
        self.num_steps += 1
        self.dense.param_groups[0]["lr"] = 0.1 * factor
        self.dense.step()
        self.lr = self.config.train.sparse.lr * factor
        with torch.no_grad():
            for name, table in self.tables.items():
                for first, last in self._column_blocks(name):
                    weight = table[:, first:last].float()
                    self._update(name, weight, table.grad[:, first:last].float(), first)
                    table[:, first:last] = weight
        return predictions.logits_BT

    def _column_blocks(self, name: str) -> list[tuple[int, int]]:
        """Row-wise Adagrad keeps one sum for each row of each column shard."""
        shards = self.plan.tables[name].shards
        width = self.plan.request.tables[name].embedding_dim
        return sorted({(s.column, s.column + s.num_columns) for s in shards}) or [(0, width)]

    def _update(self, name: str, weight: torch.Tensor, grad: torch.Tensor, column: int) -> None:
        sparse = self.config.train.sparse
        if sparse.name == "sgd":
            weight -= self.lr * grad
            return
        square = grad * grad
        if sparse.name == "rowwise_adagrad":
            square = square.sum(dim=1, keepdim=True) / grad.shape[1]
        total = self.sums[name, column] = self.sums.get((name, column), 0) + square
        weight -= self.lr * grad / (torch.sqrt(total) + sparse.eps)


def compare(config: RunConfig, plan: Plan) -> dict[str, float]:
    """On each rank: the largest differences from the twin, of logits before each step and of all weights after the last."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = torch.device(plan.request.cluster.device)
    model = build_model(config, dense_device=device)
    sharded = shard_model(model, plan, config, device)
    optimizer = TrainOptimizer(sharded, config.train, NUM_STEPS)
    twin = Twin(config, plan, device)
    local = slice(
        rank * config.train.global_batch_size // world_size, (rank + 1) * config.train.global_batch_size // world_size
    )
    worst = {"logits": 0.0}
    for mine, whole in zip(global_batches(config, world_size, rank), global_batches(config, 1, 0), strict=True):
        # one process stands in for the agreement on weights, so a short batch would differ: these are all full
        assert torch.equal(mine.labels_BT, whole.labels_BT[local])
        optimizer.zero_grad()
        loss, predictions = sharded(mine.to(device))
        loss.backward()
        optimizer.step()
        expected = twin.step(copy.copy(whole).to(device))[local]
        difference = (predictions.logits_BT - expected).abs().max().item()
        assert math.isfinite(difference)
        worst["logits"] = max(worst["logits"], difference)
    state = sharded.module.state_dict()
    for name, value in twin.model.state_dict().items():
        mine = state[name]
        if isinstance(mine, ShardedTensor):
            whole = torch.zeros_like(value)
            mine.gather(dst=0, out=whole if rank == 0 else None)
            mine = whole
        if rank == 0:
            worst[name] = (mine - value).abs().max().item()
    if rank == 0:
        start = torch.empty_like(twin.tables["item"].data)
        fill_shard(start, "item", 0, 0, *start.shape, config.seed)
        worst["moved"] = (twin.tables["item"].data - start).abs().max().item()
    return worst
