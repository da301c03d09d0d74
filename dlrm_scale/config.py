"""RunConfig: everything that decides a run, as one strict tree.

`config_io` reads it from YAML and dotted overrides. A default stands here and nowhere else.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dlrm_scale.checkpoint_config import CheckpointConfig
from dlrm_scale.communication_config import AllReduce, Communication
from dlrm_scale.errors import ConfigError
from dlrm_scale.features import FeatureSchema
from dlrm_scale.model_config import DCNv2Config, DLRMConfig, InterFormerConfig, LogisticConfig
from dlrm_scale.resilience_config import ResilienceConfig
from dlrm_scale.strict import Strict

Device = Literal["auto", "cpu", "cuda"]
BagShardingType = Literal[
    "data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise", "table_column_wise", "grid_shard"
]
SparseOptimizerName = Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam", "lamb"]
DenseOptimizerName = Literal["adam", "adamw", "adagrad", "sgd"]
FusedKernel = Literal["fused", "fused_uvm_caching", "fused_uvm"]  # rows in HBM; cached in HBM; in host memory
# FBGEMM 1.8.0 has only these on CPU, and only these have a twin for replicated tables
PLAIN_SPARSE_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
SEQUENCE_SHARDING_TYPES = (
    "table_wise",
    "column_wise",
    "row_wise",
)  # TorchRec 1.8.0 shards an EmbeddingCollection no other way


# ---------------------------------------------------------------- data
class Split(Strict):
    """Rows of one split: files in this order, and the part of their rows that counts."""

    paths: tuple[str, ...] = Field(
        min_length=1, description="files or glob patterns, relative to the working directory"
    )
    rows: tuple[float, float] = Field((0.0, 1.0), description="from this fraction of all rows to that one")

    @model_validator(mode="after")
    def _check(self) -> "Split":
        start, end = self.rows
        if not 0 <= start < end <= 1:
            raise ValueError(f"rows must be two fractions 0 <= start < end <= 1, but is [{start}, {end}]")
        return self


class SyntheticSource(Strict):
    """Power-law ids for any schema, and labels from a known function: see data/synthetic.py."""

    kind: Literal["synthetic"] = "synthetic"
    num_train: int = Field(gt=0)
    num_eval: int = Field(gt=0)
    id_skew: float = Field(1.05, ge=0, description="exponent of the ids' power law; 0 is uniform")


class ParquetSource(Strict):
    kind: Literal["parquet"] = "parquet"
    train: Split
    eval: Split | None = None


class CriteoSource(Strict):
    """Criteo's click logs: raw TSV (also .gz), or the .npy triples of torchrec's Criteo tools."""

    kind: Literal["criteo"] = "criteo"
    format: Literal["tsv", "npy"]
    train: Split
    eval: Split | None = None


class DataConfig(Strict):
    source: Annotated[SyntheticSource | ParquetSource | CriteoSource, Field(discriminator="kind")]
    lanes: int = Field(
        8, gt=0, description="virtual readers; every world size that divides it sees the same global batches"
    )
    shuffle_window_blocks: int = Field(
        8,
        ge=0,
        description="how many randomly drawn blocks (row groups) are mixed row by row; 0 keeps the files' order",
    )
    max_held_rows: int = Field(
        4_000_000, gt=0, description="decoded rows that a rank may hold: its lanes x the rows of a window"
    )
    prefetch_batches: int = Field(4, gt=0, description="batches that the background reader is ahead")
    preflight_rows: int = Field(
        1_000_000,
        ge=0,
        description="rows of each split that are read and checked before training; the rest are checked as they come",
    )


# ---------------------------------------------------------------- sharding
class TableSharding(Strict):
    """What the planner may do with one table; None leaves it free."""

    types: tuple[BagShardingType, ...] | None = Field(None, min_length=1)
    kernels: tuple[FusedKernel, ...] | None = Field(
        None, min_length=1, description="of all types but data_parallel; fused_uvm and fused_uvm_caching are for CUDA"
    )
    cache_load_factors: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.1, 0.2, 0.5), min_length=1, description="parts of the table's rows that fused_uvm_caching may hold in HBM"
    )
    min_partition: int | None = Field(None, gt=0, multiple_of=4, description="fewest columns of a column-wise shard")
    ranks: tuple[int, ...] | None = Field(None, min_length=1, description="the only ranks that may hold its shards")
    avoid_ranks: tuple[int, ...] = Field((), description="ranks that may not")
    hosts: tuple[int, ...] | None = Field(None, min_length=1, description="the only hosts that may hold its shards")
    avoid_hosts: tuple[int, ...] = Field((), description="hosts that may not")
    pin: tuple[int, ...] | None = Field(
        None, min_length=1, description="the rank of each shard, in the order of their place in the table"
    )


class ShardingConfig(Strict):
    plan: str | None = Field(None, description="a plan.json to replay; None: plan now")
    cluster: str | None = Field(
        None,
        description="the trainer plans for this cluster, a file or a name in configs/clusters; None: bandwidths are guessed",
    )
    objective: Literal["busiest_rank", "critical_path"] = Field(
        "busiest_rank",
        description="busiest_rank: TorchRec's, the largest rank's sum of compute and communication; "
        "critical_path: maximum compute forward and backward, and the maximum of each collective",
    )
    replica_groups: int = Field(
        1,
        gt=0,
        description="2D sparse parallelism: groups of ranks with a copy of all tables each (planned; the trainer has none yet)",
    )
    replica_sync_steps: int = Field(1, gt=0, description="steps after which the copies are averaged")
    tables: dict[str, TableSharding] = Field({}, description="by table; a table not named may be sharded in any way")
    together: tuple[tuple[str, ...], ...] = Field(
        (), description="groups of tables, each whole on one and the same rank"
    )
    apart: tuple[tuple[str, ...], ...] = Field((), description="groups of tables no two of which share a rank")
    communication: Communication = Communication()
    keep_close_to: str | None = Field(None, description="a plan.json of the same tables that is costly to leave")
    churn_ms_per_gb: float = Field(1.0, ge=0, description="what a GB placed elsewhere than in keep_close_to costs")
    storage_reserve: float = Field(
        0.15, ge=0, lt=1, description="part of each rank's memory that is kept free: allocator, NCCL, fragmentation"
    )
    search_seconds: float = Field(20.0, gt=0, description="the search is cut short here; usually it ends well before")


# ---------------------------------------------------------------- training
class SparseOptimizer(Strict):
    """Of the tables: fused into the backward pass, one step a micro-batch."""

    name: SparseOptimizerName = "rowwise_adagrad"
    lr: float = Field(0.02, ge=0)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="L2, on the rows a batch touches")
    stochastic_rounding: bool = Field(
        False,
        description="of fp16 tables, on CUDA: a step below half a unit of the last place moves a weight by chance, so that many such steps "
        "move it on average; false: they are lost",
    )

    @model_validator(mode="after")
    def _check(self) -> "SparseOptimizer":
        if self.weight_decay and self.name in ("adagrad", "sgd"):
            raise ValueError(
                f"weight_decay is {self.weight_decay}, but the fused {self.name} has none and would ignore it; "
                "set it to 0 or take rowwise_adagrad"
            )
        return self


class DenseOptimizer(Strict):
    name: DenseOptimizerName = "adam"
    lr: float = Field(1e-3, ge=0)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class Schedule(Strict):
    """A factor on both learning rates: linear warm-up, then decay to `final_factor` at the last step."""

    warmup_steps: int = Field(0, ge=0)
    decay: Literal["none", "linear", "cosine"] = "none"
    final_factor: float = Field(0.0, ge=0, le=1)


class TrainConfig(Strict):
    global_batch_size: int = Field(gt=0, description="samples of one optimizer step, over all ranks and micro-batches")
    accumulate_steps: int = Field(1, gt=0, description="micro-batches of one dense optimizer step; tables step at each")
    epochs: int = Field(1, gt=0)
    max_steps: int | None = Field(
        None, gt=0, description="stop after this many optimizer steps; None: after the last epoch"
    )
    pipeline: Literal["sparse_dist", "prefetch", "none"] = Field(
        "sparse_dist",
        description="overlap the next batch's id exchange, also the fill of the caches of fused_uvm_caching tables (CUDA), or a plain loop",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the dense arch's products; losses, norms and tables stay fp32"
    )
    tf32: bool = Field(
        False, description="fp32 products on CUDA in TF32: 10 bits of mantissa, 8 times the speed or more"
    )
    compile: bool = Field(
        False,
        description="the dense arch by torch.compile: the first steps take a minute or two more; where that fails, a warning says why "
        "and it runs as it is",
    )
    activation_checkpointing: bool = Field(
        False,
        description="InterFormer's layers keep their inputs only and run again in the backward pass: less memory, a third more products",
    )
    clip_grad_norm: float | None = Field(None, gt=0, description="over all dense gradients; None: no clipping")
    nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="at a loss or gradient that is no number, before anything has learned from it: end the run, drop the "
        "micro-batch, or go back to the last checkpoint and leave out the step",
    )
    max_skipped: int = Field(10, ge=0, description="micro-batches in a row that nonfinite=skip drops before it stops")
    all_reduce: AllReduce = AllReduce()
    index_dedup: bool = Field(
        False,
        description="each id of a rank's micro-batch that sequences read from a table is sent, looked up and updated once, however often it is read",
    )
    sparse: SparseOptimizer = SparseOptimizer()
    dense: DenseOptimizer = DenseOptimizer()
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.tf32 and self.precision == "bf16":
            raise ValueError("train.tf32 is of fp32 products, but train.precision is bf16; leave one of them out")
        if self.pipeline == "prefetch" and self.nonfinite != "stop":
            raise ValueError(
                f"train.pipeline is prefetch and train.nonfinite is {self.nonfinite}, but a micro-batch that is dropped would leave its "
                "rows locked in FBGEMM's caches, which its backward pass unlocks; set train.nonfinite=stop or train.pipeline=sparse_dist"
            )
        return self


class EvalConfig(Strict):
    every_steps: int = Field(0, ge=0, description="0: only after the last step")
    max_samples: int | None = Field(None, gt=0, description="evaluate on the first so many held-out samples; None: all")


class LogConfig(Strict):
    every_steps: int = Field(20, gt=0)
    window_samples: int = Field(
        100_000, gt=0, description="latest training samples, over all ranks, that the window metrics are of"
    )
    warmup_steps: int = Field(10, ge=0, description="first steps that throughput leaves out")


class OutputConfig(Strict):
    dir: str = Field(
        "runs/{name}/{time}",
        description="new, empty, or of a run to resume; {name} and {time} (of the launch) are filled in",
    )
    records: str = Field("runs/records.jsonl", description="one line is added for each finished run")


class RunConfig(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(0, ge=0, lt=2**32)
    device: Device = "auto"
    features: FeatureSchema
    data: DataConfig
    model: Annotated[InterFormerConfig | DLRMConfig | DCNv2Config | LogisticConfig, Field(discriminator="arch")]
    sharding: ShardingConfig = ShardingConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        self._check_batch()
        self._check_tables()
        self._check_model()
        return self

    def _check_batch(self) -> None:
        batch, lanes, accumulate = self.train.global_batch_size, self.data.lanes, self.train.accumulate_steps
        if batch % (lanes * accumulate):
            unit = lanes * accumulate
            raise ValueError(
                f"train.global_batch_size ({batch}) must be a multiple of data.lanes ({lanes}) x train.accumulate_steps ({accumulate}), "
                f"so that each lane gives equally many samples to each micro-batch; the nearest are "
                f"{max(unit, batch // unit * unit)} and {(batch // unit + 1) * unit}"
            )

    def _check_tables(self) -> None:
        for name, constraint in self.sharding.tables.items():
            if name not in self.features.tables:
                raise ValueError(
                    f"sharding.tables names {name}, which is not in features.tables: {', '.join(self.features.tables)}"
                )
            if constraint.types is None:
                continue
            if constraint.min_partition and not {"column_wise", "table_column_wise", "grid_shard"} & set(
                constraint.types
            ):
                raise ValueError(
                    f"sharding.tables.{name}.min_partition is of column-wise shards, but its types ({', '.join(constraint.types)}) "
                    "have none; leave it out"
                )
            if "data_parallel" in constraint.types and self.train.sparse.name not in PLAIN_SPARSE_OPTIMIZERS:
                raise ValueError(
                    f"sharding.tables.{name}.types has data_parallel, which can train by {', '.join(PLAIN_SPARSE_OPTIMIZERS)}, "
                    f"but train.sparse.name is {self.train.sparse.name}; leave it out, or change the optimizer"
                )
            if "grid_shard" in constraint.types and self.features.tables[name].pooling == "mean":
                raise ValueError(
                    f"sharding.tables.{name}.types has grid_shard, which TorchRec 1.8.0 computes wrong for pooling: mean; leave it out, "
                    f"or set features.tables.{name}.pooling=sum"
                )
            refused = [t for t in constraint.types if t not in SEQUENCE_SHARDING_TYPES]
            if name in self.features.sequence_tables and refused:
                raise ValueError(
                    f"sharding.tables.{name}.types has {', '.join(refused)}, but a sequence reads {name}, and a sequence's table can "
                    f"be sharded only as {', '.join(SEQUENCE_SHARDING_TYPES)}"
                )
        if self.train.index_dedup and not self.features.sequences:
            raise ValueError(
                "train.index_dedup is true, but it is of the ids that sequences read, and features has no sequences; leave it out"
            )
        if self.train.sparse.stochastic_rounding and all(t.data_type == "fp32" for t in self.features.tables.values()):
            raise ValueError(
                "train.sparse.stochastic_rounding is true, but all tables are fp32, which are not rounded; set it to false, or data_type: fp16 "
                "for some tables"
            )

    def _check_model(self) -> None:
        dims = {name: table.embedding_dim for name, table in self.features.tables.items()}
        if self.model.arch in ("dlrm", "dlrm_dcnv2") and len(set(dims.values())) > 1:
            raise ValueError(
                f"model.arch {self.model.arch} needs one embedding_dim for all tables, but they have "
                + ", ".join(f"{name}: {dim}" for name, dim in dims.items())
            )
        if self.train.activation_checkpointing and self.model.arch != "interformer":
            raise ValueError(
                f"train.activation_checkpointing is true, but model.arch {self.model.arch} has no layers to run again, and would ignore it; "
                "set it to false or take model.arch=interformer"
            )
        if self.model.arch == "interformer" and not self.features.sequences and self.model.mode != "sole":
            raise ValueError(
                f"model.mode {self.model.mode} needs a sequence, but features.sequences is empty; set model.mode=sole or take model.arch=dlrm_dcnv2"
            )


def check_num_ranks(config: RunConfig, num_ranks: int) -> None:
    """Raises ConfigError if so many ranks cannot share the lanes, and with them the global batch, evenly."""
    lanes = config.data.lanes
    if lanes % num_ranks:
        more_lanes = -(-lanes // num_ranks) * num_ranks
        unit = more_lanes * config.train.accumulate_steps
        batch = max(1, round(config.train.global_batch_size / unit)) * unit
        fitting = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        raise ConfigError(
            f"data.lanes ({lanes}) must be a multiple of the number of ranks ({num_ranks}), so that each takes an equal part of "
            f"train.global_batch_size ({config.train.global_batch_size}); start {fitting} ranks, "
            f"or set data.lanes={more_lanes} train.global_batch_size={batch}"
        )
