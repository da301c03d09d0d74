"""Costs and bytes of sharding options against the real: TorchRec's enumerator and estimators, FBGEMM's modules."""

import math

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator.config import EmbeddingPerfEstimatorConfig
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.estimator.types import (
    EstimatorPerfCoefficients,
    PerfCoefficient,
    PerfCoefficientConfig,
)
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams, PipelineType

from dlrm_scale.cluster import CostCoefficients
from dlrm_scale.communication_config import Communication
from dlrm_scale.config import PLAIN_SPARSE_OPTIMIZERS, SEQUENCE_SHARDING_TYPES, SparseOptimizer, TableSharding
from dlrm_scale.config_io import fingerprint
from dlrm_scale.sharding.meta_world import bare_collections
from dlrm_scale.sharding.options import BYTE_KINDS, STAGES, OptionSet, enumerate_options
from dlrm_scale.sharding.plan import PlanRequest, TableSpec
from dlrm_scale.sharding.sharders import FUSED_OPTIMIZERS, make_sharders
from dlrm_scale.training.optimizers import ReplicatedTableOptimizer
from tests.support.requests import CLUSTERS, cluster, random_request, request_of
from tools.benchmark.stock import topology

WEIGHTS, OPTIMIZER, _, INPUTS, _ = range(len(BYTE_KINDS))
TORCHREC_STAGES = [stage for stage in STAGES if stage != "replica_sync"]
MIXED = CostCoefficients(input_read=0.3, lookup=1.7, output_write=2.2, hash_size=0.9, backward=3.1)


def ours(request: PlanRequest) -> dict[tuple, np.ndarray]:
    """(table, type, kernel, cache_load_factor) -> (shards, 2 + stages + 2): rows, columns, ms, device and host bytes.

    Bytes are without the optimizer.
    """
    options = enumerate_options(request, "stock")
    kinds = [i for i in range(len(BYTE_KINDS)) if i != OPTIMIZER]
    device_bytes = options.group_device_bytes[:, kinds].sum(1)
    if request.cluster.device == "cpu":
        device_bytes -= options.group_device_bytes[:, INPUTS] / 2  # TorchRec counts one batch's ids on cpu
    columns = [options.group_num_rows, options.group_num_columns, *options.group_ms[:, : len(TORCHREC_STAGES)].T]
    groups = np.stack([*columns, device_bytes, options.group_host_bytes[:, kinds].sum(1)], axis=1)
    return {
        key: np.repeat(groups[mine], options.group_num_shards[mine], axis=0)
        for key, mine in ((key_of(options, o), options.group_option == o) for o in range(len(options.option_table)))
    }


def key_of(options: OptionSet, option: int) -> tuple:
    factor = float(options.option_cache_load_factor[option])
    return (
        options.table_names[options.option_table[option]],
        str(options.option_type[option]),
        str(options.option_kernel[option]),
        None if math.isnan(factor) else factor,
    )


def torchrecs(request: PlanRequest) -> dict[tuple, np.ndarray]:
    """The same as `ours`, by TorchRec."""
    machines, constraints = request.cluster, {name: torchrecs_constraints(name, request) for name in request.tables}
    top, weights = topology(machines), machines.cost_coefficients
    config = EmbeddingPerfEstimatorConfig()
    if weights != CostCoefficients():
        forward = PerfCoefficient(weights.input_read, weights.lookup, weights.output_write, weights.hash_size)
        config.coefficients = PerfCoefficientConfig(default=EstimatorPerfCoefficients(fwd=forward))
    enumerator = EmbeddingEnumerator(
        topology=top,
        batch_size=request.local_batch_size,
        constraints=constraints,
        estimator=[
            EmbeddingPerfEstimatorFactory.create_with_config(config, topology=top, constraints=constraints),
            EmbeddingStorageEstimator(
                topology=top,
                constraints=constraints,
                pipeline_type=PipelineType.TRAIN_SPARSE_DIST,
                run_embedding_at_peak_memory=True,
            ),
        ],
    )
    communication = request.sharding.communication
    codecs = make_sharders(SparseOptimizer(), machines.device, communication)[0].qcomm_codecs_registry
    sharders = [
        kind(qcomm_codecs_registry=codecs) for kind in (EmbeddingBagCollectionSharder, EmbeddingCollectionSharder)
    ]
    if machines.device == "cpu":  # where the stock ones have no row-wise types
        sharders = make_sharders(SparseOptimizer(), "cpu", communication)
    found = {}
    for option in enumerator.enumerate(bare_collections(request), sharders):
        cached = option.compute_kernel == "fused_uvm_caching"
        factor = (0.2 if option.cache_load_factor is None else option.cache_load_factor) if cached else None
        # On cuda hbm and ddr are the device's and the host's; on cpu the device's memory is ddr
        tiers = [
            (s.storage.hbm, s.storage.ddr) if machines.device == "cuda" else (s.storage.ddr, 0) for s in option.shards
        ]
        found[option.name, option.sharding_type, option.compute_kernel, factor] = np.array(
            [
                [*s.size, *(getattr(s.perf, stage) for stage in TORCHREC_STAGES), *tier]
                for s, tier in zip(option.shards, tiers, strict=True)
            ]
        )
    return found


def torchrecs_constraints(name: str, request: PlanRequest) -> ParameterConstraints:
    spec, constraint = request.tables[name], request.sharding.tables.get(name, TableSharding())
    types, kernels = constraint.types, constraint.kernels
    if types is None and spec.collection == "sequences":
        types = SEQUENCE_SHARDING_TYPES
    if constraint.cache_load_factors == TableSharding().cache_load_factors:
        cache = None
    else:
        cache = CacheParams(load_factor=constraint.cache_load_factors[0])
    return ParameterConstraints(
        sharding_types=None if types is None else list(types),
        compute_kernels=None if kernels is None else [*kernels, "dense"],  # dense: of data_parallel, never narrowed
        min_partition=constraint.min_partition,
        pooling_factors=list(spec.expected_ids_by_feature.values()),
        feature_names=list(spec.expected_ids_by_feature),
        cache_params=cache,
    )


def check_equals_torchrec(request: PlanRequest) -> None:
    expected, found = torchrecs(request), ours(request)
    assert set(found) == set(expected)
    for key, shards in expected.items():
        assert np.isfinite(shards).all(), key
        assert found[key].shape == shards.shape, key
        np.testing.assert_allclose(found[key], shards, rtol=1e-9, atol=0, err_msg=str(key))


@pytest.mark.parametrize("machines", CLUSTERS.values(), ids=CLUSTERS)
def test_every_shard_has_torchrecs_size_cost_and_bytes(machines):
    for seed in range(4):
        check_equals_torchrec(random_request(seed, cluster(*machines), num_tables=9))


@pytest.mark.parametrize("machines", CLUSTERS.values(), ids=CLUSTERS)
def test_coefficients_weigh_the_terms_as_torchrecs_do(machines):
    check_equals_torchrec(random_request(100, cluster(*machines, cost_coefficients=MIXED)))


@pytest.mark.parametrize(
    "communication", [{"forward": "fp16"}, {"backward": "bf16"}, {"forward": "bf16", "backward": "bf16"}], ids=str
)
@pytest.mark.parametrize("machines", CLUSTERS.values(), ids=CLUSTERS)
def test_communication_in_fewer_bytes_costs_what_torchrec_says(machines, communication):
    request = random_request(7, cluster(*machines))
    sharding = request.sharding.model_copy(update={"communication": Communication(**communication)})
    narrow = request.model_copy(update={"sharding": sharding})
    check_equals_torchrec(narrow)
    assert fingerprint(narrow) != fingerprint(request)


# ---------------------------------------------------------------- optimizer
LOCATIONS = {
    "fused": EmbeddingLocation.DEVICE,
    "fused_uvm": EmbeddingLocation.MANAGED,
    "fused_uvm_caching": EmbeddingLocation.MANAGED_CACHING,
}
PRECISIONS = {"fp32": SparseType.FP32, "fp16": SparseType.FP16}


def table_of(data_type: str) -> TableSpec:
    return TableSpec(
        collection="bags",
        num_embeddings=101,
        embedding_dim=12,
        data_type=data_type,
        pooling="sum",
        expected_ids_by_feature={"f": 1.0},
    )


def fbgemm_bytes(spec: TableSpec, kernel: str, optimizer: str, device: str) -> tuple[dict[str, int], dict[str, int]]:
    """(device, host) kind -> bytes that FBGEMM's own module allocates; for cuda on meta, which needs no GPU."""
    on_cpu = device == "cpu"
    location = EmbeddingLocation.HOST if on_cpu else LOCATIONS[kernel]
    precision = PRECISIONS[spec.data_type]
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(spec.num_embeddings, spec.embedding_dim, location, ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA)],
        optimizer=FUSED_OPTIMIZERS[optimizer],
        weights_precision=precision,
        cache_precision=precision,
        cache_sets=1,
        device=torch.device("cpu" if on_cpu else "meta"),
    )

    def allocated(state: str, places: tuple[str, ...]) -> int:
        tensors = [getattr(module, f"{state}_{place}") for place in places]
        return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)  # one element stands for none

    def tier(places: tuple[str, ...]) -> dict[str, int]:
        states = [allocated(state, places) for state in ("momentum1", "momentum2")]
        return {"weights": allocated("weights", places), "optimizer": sum(states)}

    return (tier(("host",)), tier(())) if on_cpu else (tier(("dev",)), tier(("uvm",)))


def table_wise_bytes(spec: TableSpec, kernel: str, optimizer: str, device: str) -> tuple[np.ndarray, np.ndarray]:
    """(device, host) bytes by kind of the whole table."""
    constraint = {"t": TableSharding(types=("table_wise",), kernels=(kernel,), cache_load_factors=(0.2,))}
    options = enumerate_options(request_of({"t": spec}, cluster(device, 2, 2), constraint, sparse_optimizer=optimizer))
    assert len(options.group_option) == 1
    return options.group_device_bytes[0], options.group_host_bytes[0]


@pytest.mark.parametrize("data_type", PRECISIONS)
@pytest.mark.parametrize(
    ("device", "kernel", "optimizer"),
    [
        *(("cpu", "fused", optimizer) for optimizer in PLAIN_SPARSE_OPTIMIZERS),
        *(("cuda", kernel, optimizer) for kernel in LOCATIONS for optimizer in FUSED_OPTIMIZERS),
    ],
)
def test_weights_and_optimizer_are_what_fbgemm_allocates(device, kernel, optimizer, data_type):
    spec = table_of(data_type)
    allocated = fbgemm_bytes(spec, kernel, optimizer, device)
    for found, real in zip(table_wise_bytes(spec, kernel, optimizer, device), allocated, strict=True):
        assert found[OPTIMIZER] == real["optimizer"]
        if kernel != "fused_uvm_caching" or real is allocated[1]:  # the cache holds a copy beside the weights
            assert found[WEIGHTS] == real["weights"]


@pytest.mark.parametrize("data_type", PRECISIONS)
@pytest.mark.parametrize("optimizer", PLAIN_SPARSE_OPTIMIZERS)
def test_a_replica_has_weights_gradient_and_the_states_of_its_optimizer(optimizer, data_type):
    spec = table_of(data_type)
    constraint = {"t": TableSharding(types=("data_parallel",))}
    options = enumerate_options(request_of({"t": spec}, cluster("cuda", 8, 8), constraint, sparse_optimizer=optimizer))
    table = nn.Parameter(torch.zeros(101, 12, dtype={"fp32": torch.float32, "fp16": torch.float16}[data_type]))
    table.grad = torch.ones_like(table)
    rule = ReplicatedTableOptimizer([table], SparseOptimizer(name=optimizer))
    rule.step()
    tensors = [table.grad, *rule.state[table].values()]
    assert options.option_kernel.tolist() == ["dense"] and options.group_num_shards.tolist() == [8]
    assert options.group_device_bytes[0, WEIGHTS] == table.numel() * table.element_size()
    assert options.group_device_bytes[0, OPTIMIZER] == sum(t.numel() * t.element_size() for t in tensors)
    assert not options.group_host_bytes.any()
