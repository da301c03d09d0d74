"""What a rank's memory holds beside tables, and by kind with them."""

from dlrm_scale.sharding.plan import PlanRequest

DENSE_STATES = {"adam": 2, "adamw": 2, "adagrad": 1, "sgd": 0}  # fp32 numbers kept for each parameter
FLOAT_BYTES = 4


def dense_bytes(request: PlanRequest) -> dict[str, float]:
    """Of the replicated dense arch on every rank: parameters, gradients, DDP's buckets (as large again) and optimizer
    state, all fp32 (autocast casts products, not these), and the activations that the backward pass needs."""
    parameters = request.num_dense_parameters * FLOAT_BYTES
    return {
        "dense_parameters": parameters,
        "dense_gradients": parameters,
        "dense_buckets": parameters if request.cluster.num_ranks > 1 else 0,
        "dense_optimizer": parameters * DENSE_STATES[request.dense_optimizer],
        "dense_activations": request.dense_activation_bytes,
    }


def reserved_bytes(request: PlanRequest) -> float:
    """Of the device of a rank: `sharding.storage_reserve`, for the allocator's fragments, NCCL's buffers and the CUDA context."""
    return request.sharding.storage_reserve * request.cluster.table_bytes_per_rank


def table_capacity(request: PlanRequest) -> tuple[float, float]:
    """Bytes of a rank's device memory, and of its share of the host's beside it (0 on CPU), that tables may take."""
    device = request.cluster.table_bytes_per_rank - reserved_bytes(request) - sum(dense_bytes(request).values())
    if request.cluster.device == "cpu":
        return max(device, 0.0), 0.0
    return max(device, 0.0), request.cluster.host_bytes_per_rank * (1 - request.sharding.storage_reserve)
