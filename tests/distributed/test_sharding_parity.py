"""Every sharding type computes what one unsharded process computes: logits, and tables after optimizer steps.

The twin is plain torch on the concatenated global batch. Sharded sums run in another order than the twin's, so results agree to
float32 rounding, not bitwise: about 1e-6 after three steps, against 1e-2 that the steps move; the bound leaves a factor of ten.
"""

import copy

import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from dlrm_scale.cluster import this_cluster
from dlrm_scale.config import RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.data.loader import Reader, agree_alone, batches
from dlrm_scale.data.open import open_source
from dlrm_scale.data.order import Order
from dlrm_scale.models.embeddings import Embeddings
from dlrm_scale.models.ranking_model import RankingModel, build_model
from dlrm_scale.sharding.apply import INIT_BLOCK_ROWS, MODULE_PATHS, _fill, shard_model
from dlrm_scale.sharding.plan import Plan, plan_request
from dlrm_scale.sharding.planner import find_plan
from dlrm_scale.training.optimizers import TrainOptimizer
from tests.support.configs import tiny_config

BAG_TYPES = (
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
)
SEQUENCE_TYPES = ("table_wise", "column_wise", "row_wise")
NUM_STEPS = 3
TOLERANCE = 1e-5


def case_config(bag_type: str, sequence_type: str, sparse: dict) -> RunConfig:
    """Bag tables 256 wide (grid_shard splits columns over hosts in blocks of 128), sequence tables 32."""
    tag_pooling = "sum" if bag_type == "grid_shard" else "mean"
    tables = {
        "user": {"num_embeddings": 500, "embedding_dim": 256},
        "tag": {"num_embeddings": 101, "embedding_dim": 256, "pooling": tag_pooling},
        "item": {"num_embeddings": 303, "embedding_dim": 32},
        "category": {"num_embeddings": 20, "embedding_dim": 32},
    }
    constraints = {name: {"types": [bag_type], "min_partition": 128} for name in ("user", "tag")}
    constraints |= {name: {"types": [sequence_type], "min_partition": 16} for name in ("item", "category")}
    return tiny_config(
        features={"tables": tables},
        sharding={"tables": constraints},
        train={"sparse": sparse, "dense": {"name": "sgd", "lr": 0.1}},
    )


def make_plan(config: RunConfig, world_size: int, ranks_per_host: int) -> Plan:
    skeleton = torch.nn.Module()
    skeleton.embeddings = Embeddings(config.features)
    request = plan_request(config, this_cluster(world_size, ranks_per_host, "cpu"))
    return find_plan(skeleton, request, config.train.sparse, search_seconds=5)


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
    stream = batches(reader.steps(0), config.features, local_batch_size=local, accumulate_steps=1, agree=agree_alone)
    return [next(stream) for _ in range(NUM_STEPS)]


class Twin:
    """The model on one process: tables as plain parameters, stepped by FBGEMM's documented rules."""

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        self.config, self.plan = config, plan
        self.model: RankingModel = build_model(
            config, table_device=torch.device("cpu"), dense_device=torch.device("cpu")
        )
        self.tables = {}
        for name, spec in plan.request.tables.items():
            inner = "embedding_bags" if spec.collection == "bags" else "embeddings"
            self.tables[name] = self.model.get_parameter(f"{MODULE_PATHS[spec.collection]}.{inner}.{name}.weight")
            _fill(self.tables[name].data, name, 0, 0, spec.num_embeddings, spec.embedding_dim, config.seed)
        self.dense = torch.optim.SGD(
            [p for n, p in self.model.named_parameters() if not n.startswith("embeddings.")], lr=0.1
        )
        self.sums: dict[tuple[str, int], torch.Tensor] = {}

    def step(self, batch: RecBatch) -> torch.Tensor:
        loss, predictions = self.model(batch)
        self.model.zero_grad()
        loss.backward()
        self.dense.step()
        with torch.no_grad():
            for name, table in self.tables.items():
                for first, last in self._column_blocks(name):
                    self._update(name, table[:, first:last], table.grad[:, first:last], first)
        return predictions.logits_BT

    def _column_blocks(self, name: str) -> list[tuple[int, int]]:
        """Row-wise Adagrad keeps one sum for each row of each column shard."""
        shards = self.plan.tables[name].shards
        width = self.plan.request.tables[name].embedding_dim
        return sorted({(s.column, s.column + s.num_columns) for s in shards}) or [(0, width)]

    def _update(self, name: str, weight: torch.Tensor, grad: torch.Tensor, column: int) -> None:
        sparse = self.config.train.sparse
        if sparse.name == "sgd":
            weight -= sparse.lr * grad
            return
        square = grad * grad
        if sparse.name == "rowwise_adagrad":
            square = square.sum(dim=1, keepdim=True) / grad.shape[1]
        total = self.sums[name, column] = self.sums.get((name, column), 0) + square
        weight -= sparse.lr * grad / (torch.sqrt(total) + sparse.eps)


def compare(config: RunConfig, plan: Plan) -> dict[str, float]:
    """On each rank: the largest differences from the twin, of logits before each step and of all weights after the last."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = build_model(config, dense_device=torch.device("cpu"))
    sharded = shard_model(model, plan, config.train.sparse, torch.device("cpu"), config.seed)
    optimizer = TrainOptimizer(sharded, config.train, NUM_STEPS)
    twin = Twin(config, plan)
    local = slice(
        rank * config.train.global_batch_size // world_size, (rank + 1) * config.train.global_batch_size // world_size
    )
    worst = {"logits": 0.0}
    for mine, whole in zip(global_batches(config, world_size, rank), global_batches(config, 1, 0), strict=True):
        # one process stands in for the agreement on weights, so a short batch would differ: these are all full
        assert torch.equal(mine.labels_BT, whole.labels_BT[local])
        optimizer.zero_grad()
        loss, predictions = sharded(mine)
        loss.backward()
        optimizer.step()
        expected = twin.step(copy.copy(whole))[local]
        worst["logits"] = max(worst["logits"], (predictions.logits_BT - expected).abs().max().item())
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
        _fill(start, "item", 0, 0, *start.shape, config.seed)
        worst["moved"] = (twin.tables["item"].data - start).abs().max().item()
    return worst


def check(ranks, config: RunConfig, ranks_per_host: int, types: dict[str, str]) -> None:
    plan = make_plan(config, ranks.world_size, ranks_per_host)
    assert {name: plan.tables[name].sharding_type for name in types} == types
    results = ranks.run(compare, config, plan)
    assert results[0].pop("moved") > 1e-3, "the tables did not train"
    for worst in results:
        wrong = {name: diff for name, diff in worst.items() if not diff <= TOLERANCE}
        assert not wrong, wrong


@pytest.mark.parametrize("bag_type", BAG_TYPES)
def test_bag_tables_on_two_ranks(two_ranks, bag_type):
    config = case_config(bag_type, "table_wise", {"name": "rowwise_adagrad", "lr": 0.1})
    check(two_ranks, config, 2, {"user": bag_type, "tag": bag_type})


@pytest.mark.parametrize("bag_type", BAG_TYPES)
def test_bag_tables_on_four_ranks_of_two_hosts(four_ranks, bag_type):
    config = case_config(bag_type, "row_wise", {"name": "rowwise_adagrad", "lr": 0.1})
    check(four_ranks, config, 2, {"user": bag_type, "tag": bag_type})


@pytest.mark.parametrize("sequence_type", SEQUENCE_TYPES)
@pytest.mark.parametrize("world", ["two_ranks", "four_ranks"])
def test_sequence_tables(request, world, sequence_type):
    config = case_config("table_wise", sequence_type, {"name": "rowwise_adagrad", "lr": 0.1})
    check(request.getfixturevalue(world), config, 2, {"item": sequence_type, "category": sequence_type})


@pytest.mark.parametrize(
    "sparse",
    [
        {"name": "sgd", "lr": 0.5},
        # with a small eps the first step is lr * sign(g): where g is rounding noise, so is the step
        {"name": "adagrad", "lr": 0.1, "eps": 1e-2},
    ],
    ids=lambda s: s["name"],
)
@pytest.mark.parametrize("bag_type", ["data_parallel", "column_wise", "row_wise"])
def test_other_fused_optimizers(two_ranks, sparse, bag_type):
    check(two_ranks, case_config(bag_type, "row_wise", sparse), 2, {"user": bag_type})


def initial_table(config: RunConfig, plan: Plan) -> torch.Tensor:
    sharded = shard_model(
        build_model(config, dense_device=torch.device("cpu")),
        plan,
        config.train.sparse,
        torch.device("cpu"),
        config.seed,
    )
    weight = sharded.module.state_dict()["embeddings.ebc.embedding_bags.user.weight"]
    whole = torch.zeros(weight.size())
    weight.gather(dst=0, out=whole if torch.distributed.get_rank() == 0 else None)
    return whole


def test_initial_values_do_not_depend_on_plan_or_world(two_ranks, four_ranks):
    """Also where shards begin within the blocks that the values are drawn in."""
    rows = 2 * INIT_BLOCK_ROWS + 1001
    seen = []
    for ranks, bag_type in ((two_ranks, "row_wise"), (four_ranks, "row_wise"), (two_ranks, "column_wise")):
        config = tiny_config(
            features={
                "tables": {
                    "user": {"num_embeddings": rows, "embedding_dim": 8},
                    "item": {"num_embeddings": 300, "embedding_dim": 8},
                },
                "categorical": [{"name": "user", "table": "user"}],
                "sequences": [{"name": "h", "max_length": 3, "fields": [{"name": "hi", "table": "item"}]}],
            },
            sharding={"tables": {"user": {"types": [bag_type], "min_partition": 4}}},
        )
        seen.append(ranks.run(initial_table, config, make_plan(config, ranks.world_size, 2))[0])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].abs().max() <= rows**-0.5 and seen[0].std() > 0.5 * rows**-0.5
    assert len(torch.unique(seen[0])) > 0.5 * seen[0].numel()
