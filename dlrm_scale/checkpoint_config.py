"""What is saved when, and what a run may start from: the section `checkpoint` of a `RunConfig`."""

from typing import Literal

from pydantic import Field, model_validator

from dlrm_scale.strict import Strict


class WarmStart(Strict):
    """Weights of another run to begin with. Step, data position and RNG begin anew; what no rule covers must match."""

    path: str = Field(
        description="a step folder, a folder of checkpoints, or a run folder (its newest valid checkpoint)"
    )
    new_tables: tuple[str, ...] = Field(
        (), description="tables that the checkpoint lacks: they keep their first values"
    )
    grown_tables: tuple[str, ...] = Field(
        (), description="tables with more rows than in the checkpoint: the further rows keep their first values"
    )
    dropped_tables: tuple[str, ...] = Field((), description="tables of the checkpoint that the model has no more")
    fresh_dense: tuple[str, ...] = Field(
        (),
        description="prefixes of dense parameters (arch.head) that keep their first values, whatever the checkpoint has",
    )
    fresh_optimizer: bool = Field(False, description="begin with empty optimizer state instead of the checkpoint's")


class CheckpointConfig(Strict):
    dir: str = Field(
        "{run}/checkpoints", description="where step folders go; {run} is output.dir; scheme://... with a path handler"
    )
    every_steps: int | None = Field(
        None, ge=0, description="besides the last step; 0: only the last step; None: as often as it pays (Daly's rule)"
    )
    mtbf_hours: float = Field(
        24.0,
        gt=0,
        description="mean time between failures of the whole job, which Daly's rule weighs a save's cost against",
    )
    keep_last: int = Field(
        2, gt=0, description="newest checkpoints that are kept; the second one is what a bad one falls back to"
    )
    keep_every_steps: int = Field(0, ge=0, description="checkpoints of these steps are never deleted; 0: none")
    mode: Literal["async", "sync"] = Field(
        "async",
        description="async: training goes on while a copy in host memory is written; sync: it waits, needs no copy",
    )
    max_failures: int = Field(3, gt=0, description="saves that fail in a row before the run stops")
    path_handlers: tuple[str, ...] = Field(
        (), description="iopath handlers to register, as module:Class; for dir and warm_start.path"
    )
    warm_start: WarmStart | None = Field(None, description="ignored once the run has a checkpoint of its own")

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        wrong = [handler for handler in self.path_handlers if handler.count(":") != 1]
        if wrong:
            raise ValueError(f"path_handlers are written module:Class, but one is {wrong[0]}")
        return self
