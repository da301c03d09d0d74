"""Bytes of one shard by kind and tier of memory.

Weights, cache and buffers are TorchRec 1.8.0's (`calculate_shard_storages` in `planner/shard_estimators.py`): the ids
of two batches, as `TrainPipelineSparseDist` holds them, and one batch's outputs. The optimizer is not: TorchRec counts
none for tables whose optimizer is fused. Here it is what FBGEMM 1.8.0 allocates.
"""

import numpy as np

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.sharding.groups import Groups

BATCHES_OF_IDS = 2
STATE_BYTES = 4  # fp32, whatever the weights are
# Optimizer -> states of one number a weight, states of one number a row
OPTIMIZER_STATES = {
    "rowwise_adagrad": (0, 1),
    "adagrad": (1, 0),
    "sgd": (0, 0),
    "adam": (2, 0),
    "partial_rowwise_adam": (1, 1),
    "lamb": (2, 0),
}


def shard_bytes(
    groups: Groups, cluster: ClusterSpec, sparse_optimizer: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Kind -> (G,) bytes of one shard, in the memory of its device (cpu: the host's), and in host memory beside it."""
    in_host = groups.is_kernel("fused_uvm", "fused_uvm_caching")
    weights = groups.num_rows * groups.num_columns * groups.element_bytes
    device_optimizer, host_optimizer = _optimizer_bytes(groups, in_host, weights, sparse_optimizer)
    cached, cache_state = _cache_bytes(groups)
    used = groups.num_rows > 0
    device = {
        "weights": np.where(in_host, cached, weights),
        "optimizer": device_optimizer,
        "cache_state": cache_state,
        "inputs": np.where(used, BATCHES_OF_IDS * groups.input_bytes, 0),
        "outputs": np.where(used, np.ceil(groups.output_bytes), 0),
    }
    nothing = np.zeros_like(device["inputs"])
    host = {
        "weights": np.where(in_host, weights, 0),
        "optimizer": host_optimizer,
        "cache_state": nothing,
        "inputs": nothing,
        "outputs": nothing,
    }
    return device, host


def _cache_bytes(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """(G,) cached rows in HBM, and what tells which they are (`_calculate_cache_aux_state_sizes`)."""
    caching = groups.is_kernel("fused_uvm_caching")
    factor = np.where(caching, groups.cache_load_factor, 0)
    table_weights = groups.table_num_rows * groups.table_num_columns
    part = np.round(table_weights * groups.element_bytes * factor) * (groups.num_rows * groups.num_columns)
    return np.ceil(part / table_weights), np.where(caching, np.ceil(groups.num_rows * (4 + factor * 16)), 0)


def _optimizer_bytes(
    groups: Groups, in_host: np.ndarray, weights: np.ndarray, sparse_optimizer: str
) -> tuple[np.ndarray, np.ndarray]:
    """(G,) in the device's memory and in the host's.

    `SplitTableBatchedEmbeddingBagsCodegen` places states by `construct_split_state`: beside the weights, but states of
    one number a row always on the device. A replicated table has the states of `ReplicatedTableOptimizer`, which are
    the same, and its whole gradient, which is counted here.
    """
    num_by_weight, num_by_row = OPTIMIZER_STATES[sparse_optimizer]
    by_weight = num_by_weight * STATE_BYTES * groups.num_rows * groups.num_columns
    by_row = num_by_row * STATE_BYTES * groups.num_rows
    gradient = np.where(groups.is_type("data_parallel"), weights, 0)
    return by_row + gradient + np.where(in_host, 0, by_weight), np.where(in_host, by_weight, 0)
