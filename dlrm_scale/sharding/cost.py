"""Time of one shard in one step, by TorchRec 1.8.0's default estimate.

The formulas are those of `torchrec/distributed/planner/estimator/estimator.py` (the evaluator named in each docstring)
with `HardwarePerfConfig`'s defaults, `BasicCommsBandwidths` and `constants.kernel_bw_lookup`. Its quirks are kept: a
row-wise shard costs the same with fewer rows or none, row-wise shards pay no penalty for narrow rows, and rows of fp16 tables
travel in fp16 unless `communication` has a codec, though FBGEMM looks them up into fp32.
"""

import numpy as np

from dlrm_scale.cluster import ClusterSpec, bytes_per_ms
from dlrm_scale.communication_config import PLAIN, Communication, CommunicationPrecision
from dlrm_scale.sharding.groups import ID_BYTES, KERNELS, Groups
from dlrm_scale.sharding.plan import PlanRequest

BATCHED_COPY_FACTOR = 2.455  # the constants are `planner/constants.py`'s, "empirical studies" there
REPLICA_UPDATE_FACTOR = 9.22
NARROW_PENALTIES = ((64, 1.75), (128, 1.15))  # (rows of fewer columns than this, factor)
LEAST_COLUMNS = 32  # narrower rows are read as if they had these
UVM_SLOWDOWN = 10
SENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # of a number in an exchange


def shard_ms(
    groups: Groups, cluster: ClusterSpec, world: ClusterSpec, communication: Communication = PLAIN
) -> dict[str, np.ndarray]:
    """Stage -> (G,) ms of one shard on `cluster`; what is replicated is so on all ranks of `world`."""
    device_bandwidth = _device_bandwidth(groups, cluster)
    sent = [_sent_bytes(groups, communication, p) for p in (communication.forward, communication.backward)]
    forward = _forward_compute(groups, cluster, device_bandwidth, sent[0])
    forward_comms, backward_comms = _comms(groups, cluster, world, device_bandwidth, sent)
    return {
        "fwd_compute": forward,
        "fwd_comms": forward_comms,
        "bwd_compute": forward * cluster.cost_coefficients.backward,
        "bwd_comms": backward_comms,
        "prefetch_compute": np.zeros_like(forward),  # TorchRec's, without statistics of cache misses
        "input_dist_comms": np.where(
            groups.is_type("data_parallel"),
            0.0,
            cluster.cost_coefficients.all_to_all * np.ceil(groups.all_lookups * ID_BYTES) / _world_bandwidth(cluster),
        ),
    }


def _sent_bytes(groups: Groups, communication: Communication, precision: CommunicationPrecision) -> np.ndarray:
    """(G,) of one number of a row in an exchange (`extract_comm_data_type_size`); replicas exchange none."""
    if communication == PLAIN:  # no codec in either direction
        return groups.element_bytes
    return np.where(groups.is_type("data_parallel"), groups.element_bytes, SENT_BYTES[precision])


def _device_bandwidth(groups: Groups, cluster: ClusterSpec) -> np.ndarray:
    """(G,) bytes/ms of the memory the kernel reads and writes (`kernel_bw_lookup`)."""
    if cluster.device == "cpu":
        host = bytes_per_ms(cluster.host_memory_gb_per_s)
        return np.where(groups.is_kernel("dense"), 0.5 * host, host)
    hbm, link = bytes_per_ms(cluster.hbm_gb_per_s), bytes_per_ms(cluster.host_link_gb_per_s)
    by_kernel = {"dense": 0.5 * hbm, "fused": hbm, "fused_uvm": link / UVM_SLOWDOWN, "fused_uvm_caching": np.nan}
    cached = groups.cache_load_factor
    with_cache = (cached * hbm + (1 - cached) * link) / UVM_SLOWDOWN
    return np.where(
        groups.is_kernel("fused_uvm_caching"), with_cache, np.array([by_kernel[k] for k in KERNELS])[groups.kernel_code]
    )


def _world_bandwidth(cluster: ClusterSpec) -> float:
    """bytes/ms of a collective of all ranks (`BasicCommsBandwidths.get_bw`)."""
    return bytes_per_ms(cluster.intra_host_gb_per_s if cluster.num_hosts == 1 else cluster.inter_host_gb_per_s)


def _forward_compute(
    groups: Groups, cluster: ClusterSpec, device_bandwidth: np.ndarray, sent_bytes: np.ndarray
) -> np.ndarray:
    """(G,) ms: ids read, rows read, outputs written as they are sent (`_default_fwd_comp`)."""
    whole_rows = groups.is_type("table_wise", "column_wise", "table_column_wise")
    read_columns = np.where(whole_rows, np.maximum(groups.num_columns, LEAST_COLUMNS), groups.num_columns)
    narrow = np.select(
        [groups.num_columns < columns for columns, _ in NARROW_PENALTIES], [f for _, f in NARROW_PENALTIES], 1
    )
    weights = cluster.cost_coefficients
    size = (
        weights.input_read * groups.input_bytes
        + weights.lookup * (groups.lookups * read_columns * groups.element_bytes)
        + weights.output_write * groups.outputs * groups.num_columns * sent_bytes
        + weights.hash_size * groups.num_rows
    )
    return size * np.where(whole_rows, narrow, 1) / device_bandwidth


def _comms(
    groups: Groups, cluster: ClusterSpec, world: ClusterSpec, device_bandwidth: np.ndarray, sent_bytes: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(G,) ms forward and backward, with `sent_bytes` of a number forward and backward.

    `TableWiseEvaluator`: all-to-all of all ranks. `RowWiseEvaluator`: reduce-scatter, backward all-gather and a batched
    copy. `TableRowWiseEvaluator` (and grid_shard): the same within the host, and an all-to-all between hosts.
    `DataParallelEvaluator`: nothing forward, the gradient's all-reduce and the update backward. Each collective's bytes
    over bandwidth are weighed by its coefficient; rows of sequences, which are not summed, go by all-to-all.
    """
    weights = cluster.cost_coefficients
    by_host, by_row = groups.is_type("table_row_wise", "grid_shard"), groups.is_type("row_wise")
    summed = by_host | (by_row & groups.is_pooled)
    bandwidth = np.where(by_host, bytes_per_ms(cluster.intra_host_gb_per_s), _world_bandwidth(cluster))
    numbers_between = groups.outputs_per_rank * cluster.num_hosts * groups.num_columns * (cluster.num_hosts > 1)
    between = by_host * weights.all_to_all * numbers_between / bytes_per_ms(cluster.inter_host_gb_per_s)
    forward_bytes, backward_bytes = (groups.outputs * groups.num_columns * each for each in sent_bytes)
    forward = forward_bytes / bandwidth * np.where(summed, weights.reduce_scatter, weights.all_to_all)
    backward = backward_bytes / bandwidth * np.where(summed, weights.all_gather, weights.all_to_all)
    forward, backward = (ms + between * each for ms, each in zip((forward, backward), sent_bytes, strict=True))
    backward += np.where(by_host | by_row, backward_bytes * BATCHED_COPY_FACTOR / device_bandwidth, 0)
    replicated = groups.is_type("data_parallel")
    return np.where(replicated, 0, forward), np.where(
        replicated, _replica_ms(groups, world, device_bandwidth), backward
    )


def _replica_ms(groups: Groups, cluster: ClusterSpec, device_bandwidth: np.ndarray) -> np.ndarray:
    """(G,) ms: ring all-reduce of a table's gradient, and the optimizer's passes over the table."""
    table_bytes = groups.num_rows * groups.num_columns * groups.element_bytes
    all_reduce = cluster.cost_coefficients.all_reduce * plain_all_reduce_ms(table_bytes, cluster)
    return all_reduce + table_bytes * REPLICA_UPDATE_FACTOR / device_bandwidth


def plain_all_reduce_ms(num_bytes: np.ndarray | float, cluster: ClusterSpec) -> np.ndarray | float:
    """TorchRec's: a ring between hosts over one NIC a rank."""
    hosts = min(cluster.num_hosts, 2)
    bandwidth = bytes_per_ms(cluster.inter_host_gb_per_s) * cluster.ranks_per_host
    ring = num_bytes * (2 * hosts - 1) / hosts / bandwidth
    return ring * 2 if cluster.num_hosts > 2 else ring


def replica_sync_ms(
    groups: Groups, request: PlanRequest, device_bytes: dict[str, np.ndarray], host_bytes: dict[str, np.ndarray]
) -> np.ndarray:
    """(G,) ms of one shard: `DMPCollection.sync`'s ring all-reduce of weights and optimizer state over the copies of its rank, which
    are neighbours on one host, over `replica_sync_steps`. Not TorchRec's estimate: it has none. Rows in host memory pass the link to
    it. data_parallel tables average their gradients over all ranks instead.
    """
    cluster, num_groups = request.cluster, request.sharding.replica_groups
    between = bytes_per_ms(cluster.intra_host_gb_per_s)
    host_link = min(between, bytes_per_ms(cluster.host_link_gb_per_s)) if cluster.device == "cuda" else between
    of_tier = [(device_bytes["weights"] + device_bytes["optimizer"]) / between]
    of_tier.append((host_bytes["weights"] + host_bytes["optimizer"]) / host_link)
    ring = 2 * (num_groups - 1) / num_groups * cluster.cost_coefficients.all_reduce
    ms = sum(of_tier) * ring / request.sharding.replica_sync_steps
    return np.where(groups.is_type("data_parallel"), 0.0, ms)
