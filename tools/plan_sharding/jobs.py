"""What is to be planned: a run configuration, or tables alone, on a cluster.

PyTorch is imported where a model is traced, and nowhere else: it takes seconds, and tables alone do not need it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import RunConfig, ShardingConfig, SparseOptimizerName, check_num_ranks
from dlrm_scale.config_io import parse_config, parse_overrides
from dlrm_scale.errors import ConfigError
from dlrm_scale.libraries import loading_libraries
from dlrm_scale.sharding.plan import PlanRequest, plan_request
from dlrm_scale.strict import Strict
from tools.plan_sharding.tables import read_tables


class TablesOptions(Strict):
    """What overrides may set where there is no run configuration."""

    sharding: ShardingConfig = ShardingConfig()
    sparse_optimizer: SparseOptimizerName = "rowwise_adagrad"
    num_dense_parameters: int = Field(0, ge=0)


@dataclass(frozen=True)
class Job:
    request: PlanRequest
    config: RunConfig | None
    resize: Callable[[ClusterSpec, int], "Job"]  # the same on another cluster, at another local batch size


def config_job(config: RunConfig, cluster: ClusterSpec) -> Job:
    """Traces the dense arch, so that its parameters and activations are counted.

    Raises:
        ConfigError: the cluster's ranks cannot share the batch, or the configuration names a plan to replay.
    """
    check_num_ranks(config, cluster.num_ranks)
    _check_no_plan(config.sharding)
    with loading_libraries():
        from dlrm_scale.models.dense_trace import trace_dense
    local_batch_size = config.train.global_batch_size // config.train.accumulate_steps // cluster.num_ranks
    trace = trace_dense(config, local_batch_size, cluster.device)

    def resize(to: ClusterSpec, local_batch_size: int) -> Job:
        tree = config.model_dump(mode="json")
        tree["train"]["global_batch_size"] = local_batch_size * to.num_ranks * config.train.accumulate_steps
        return config_job(parse_config(tree, f"the configuration at {local_batch_size} samples a rank"), to)

    return Job(plan_request(config, cluster, trace.num_parameters, trace.activation_bytes), config, resize)


def tables_job(path: str, overrides: list[str], cluster: ClusterSpec, local_batch_size: int) -> Job:
    """Raises ConfigError: a file, an override or a batch size that is not valid."""
    if local_batch_size < 1:
        raise ConfigError(f"--local-batch-size must be at least 1 sample a rank, but is {local_batch_size}")
    options = parse_overrides(TablesOptions, overrides)
    _check_no_plan(options.sharding)
    request = PlanRequest(
        tables=read_tables(path),
        cluster=cluster,
        local_batch_size=local_batch_size,
        sparse_optimizer=options.sparse_optimizer,
        num_dense_parameters=options.num_dense_parameters,
        dense_optimizer="adam",
        dense_activation_bytes=0,
        sharding=options.sharding,
    )
    return _of_tables(request)


def _of_tables(request: PlanRequest) -> Job:
    def resize(to: ClusterSpec, local_batch_size: int) -> Job:
        return _of_tables(request.model_copy(update={"cluster": to, "local_batch_size": local_batch_size}))

    return Job(request, None, resize)


def _check_no_plan(sharding: ShardingConfig) -> None:
    if sharding.plan is not None:
        raise ConfigError(
            f"sharding.plan is {sharding.plan}, which the trainer would replay; give --plan {sharding.plan} sharding.plan=null to look "
            "at it, or sharding.plan=null to plan anew"
        )
