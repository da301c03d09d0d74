"""Plans and dense traces of many configurations that share most of their parts, each found once.

PyTorch is imported where a model is traced, and nowhere else: it takes seconds, which a wrong key need not wait for.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import fingerprint
from dlrm_scale.errors import NoPlanError
from dlrm_scale.libraries import loading_libraries
from dlrm_scale.sharding.plan import Plan, plan_request
from dlrm_scale.sharding.planner import find_plan

if TYPE_CHECKING:
    from dlrm_scale.models.dense_trace import DenseTrace, Device

ROUNDS = 50  # of the search: at most 0.1 % above the full search's score where tried, in a tenth of its time
TRACED_BATCHES = (64, 128)
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class DenseWork:
    """Of one rank's micro-batch; see `DenseTrace`. `activation_bytes`: in the precision that keeps most, so that a plan serves both."""

    num_parameters: int
    activation_bytes: int
    flops: int


class Plans:
    """Finds and remembers. A plan found here is the one whose times were predicted: give it to the trainer as `sharding.plan`."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        self.rounds = rounds
        self._plans: dict[str, Plan | NoPlanError] = {}
        self._traces: dict[str, tuple[tuple[DenseTrace, ...], int]] = {}

    def __len__(self) -> int:
        """How many requests have been planned."""
        return len(self._plans)

    def dense(self, config: RunConfig, local_batch_size: int, device: Device) -> DenseWork:
        """Raises ConfigError: the features do not suit the arch."""
        (small, small_flops), (large, large_flops) = (self._traced(config, size, device) for size in TRACED_BATCHES)

        def at_batch(few: int, many: int) -> int:
            """Work and bytes are affine in the batch: every term is a sample's or a parameter's."""
            low, high = TRACED_BATCHES
            return round(few + (many - few) * (local_batch_size - low) / (high - low))

        return DenseWork(
            small[0].num_parameters,
            max(at_batch(few.activation_bytes, many.activation_bytes) for few, many in zip(small, large, strict=True)),
            at_batch(small_flops, large_flops),
        )

    def _traced(self, config: RunConfig, batch_size: int, device: Device) -> tuple[tuple[DenseTrace, ...], int]:
        """A trace in each precision, and the FLOPs, in which they do not differ, of both passes."""
        parts = [config.features.model_dump(mode="json"), config.model.model_dump(mode="json"), batch_size, device]
        parts += [config.train.activation_checkpointing, config.train.tf32]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        if key not in self._traces:
            with loading_libraries():
                from dlrm_scale.models.dense_trace import count_flops, trace_dense
            each = [config.train.model_copy(update={"precision": p}) for p in PRECISIONS]
            traces = tuple(trace_dense(config.model_copy(update={"train": t}), batch_size, device) for t in each)
            self._traces[key] = traces, sum(count_flops(config, batch_size))
        return self._traces[key]

    def plan(self, config: RunConfig, cluster: ClusterSpec) -> Plan:
        """Raises NoPlanError: nothing fits. ConfigError: rules that contradict each other, or ranks that cannot share the batch."""
        work = self.dense(config, local_batch_size(config, cluster), cluster.device)
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
