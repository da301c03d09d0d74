"""Plans and dense traces of many configurations that share most of their parts, each found once."""

import hashlib
import json
from dataclasses import dataclass

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import fingerprint
from dlrm_scale.errors import NoPlanError
from dlrm_scale.models.dense_trace import DenseTrace, trace_dense
from dlrm_scale.sharding.plan import Plan, plan_request
from dlrm_scale.sharding.planner import find_plan

ROUNDS = 50  # of the search: at most 0.1 % above the full search's score where tried, in a tenth of its time
TRACED_BATCHES = (64, 128)


@dataclass(frozen=True)
class DenseWork:
    """Of one rank's micro-batch; see `DenseTrace`."""

    num_parameters: int
    activation_bytes: int
    flops: int


class Plans:
    """Finds and remembers. A plan found here is the one whose times were predicted: give it to the trainer as `sharding.plan`."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        self.rounds = rounds
        self._plans: dict[str, Plan | NoPlanError] = {}
        self._traces: dict[str, tuple[DenseTrace, DenseTrace]] = {}

    def __len__(self) -> int:
        """How many requests have been planned."""
        return len(self._plans)

    def dense(self, config: RunConfig, local_batch_size: int) -> DenseWork:
        """Raises ConfigError: the features do not suit the arch."""
        parts = [config.features, config.model]
        text = json.dumps([[p.model_dump(mode="json") for p in parts], config.train.precision], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self._traces:
            self._traces[key] = tuple(trace_dense(config, size) for size in TRACED_BATCHES)
        small, large = self._traces[key]

        def at_batch(few: int, many: int) -> int:
            """Work and bytes are affine in the batch: every term is a sample's or a parameter's."""
            low, high = TRACED_BATCHES
            return round(few + (many - few) * (local_batch_size - low) / (high - low))

        return DenseWork(
            small.num_parameters,
            at_batch(small.activation_bytes, large.activation_bytes),
            at_batch(small.forward_flops + small.backward_flops, large.forward_flops + large.backward_flops),
        )

    def plan(self, config: RunConfig, cluster: ClusterSpec) -> Plan:
        """Raises NoPlanError: nothing fits. ConfigError: rules that contradict each other, or ranks that cannot share the batch."""
        work = self.dense(config, local_batch_size(config, cluster))
        request = plan_request(config, cluster, work.num_parameters, work.activation_bytes)
        key = fingerprint(request)
        if key not in self._plans:
            try:
                self._plans[key] = find_plan(request, num_rounds=self.rounds).plan
            except NoPlanError as e:
                self._plans[key] = e
        found = self._plans[key]
        if isinstance(found, NoPlanError):
            raise NoPlanError(str(found))
        return found


def local_batch_size(config: RunConfig, cluster: ClusterSpec) -> int:
    return config.train.global_batch_size // config.train.accumulate_steps // cluster.num_ranks
