"""The `resilience` section of a configuration: when a job counts as hung, and a rank as slow."""

from pydantic import Field

from dlrm_scale.strict import Strict


class ResilienceConfig(Strict):
    watchdog_seconds: float = Field(
        300.0, ge=0, description="a rank that makes no progress for so long ends the job, with exit code 71; 0: never"
    )
    watchdog_long_seconds: float = Field(
        1800.0, gt=0, description="the same while it starts, plans, loads, saves or evaluates (between two batches)"
    )
    straggler_ratio: float = Field(
        2.0,
        gt=1,
        description="a rank whose own time is so many times the others' median three logs in a row is named on the console",
    )
