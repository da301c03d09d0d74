"""One run from its configuration to its record: check and plan on rank 0, then train on all ranks."""

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from dlrm_scale.cluster import ClusterSpec, check_ranks, load_cluster, this_cluster
from dlrm_scale.config import RunConfig, check_num_ranks
from dlrm_scale.config_io import dump_config, fingerprint
from dlrm_scale.data.open import open_source, preflight
from dlrm_scale.data.synthetic import SyntheticSource
from dlrm_scale.errors import ConfigError, NoPlanError
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.plan import Plan, load_plan, plan_request, save_plan
from dlrm_scale.sharding.planner import find_plan
from dlrm_scale.training.metrics import binary_metrics
from dlrm_scale.training.monitor import Board, Metrics, peak_memory_bytes
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import Rank, from_first_rank, process_group, this_rank
from dlrm_scale.training.readers import EvalReader, TrainReader
from dlrm_scale.training.report import append_record, print_end, print_start, run_record
from dlrm_scale.training.trainer import Trainer, TrainResult


@dataclass(frozen=True)
class Prepared:
    """What rank 0 finds out before the process group exists, and tells the others."""

    plan: Plan
    run_dir: Path


def run(config: RunConfig) -> TrainResult:
    """Trains `config`. Every rank calls it; rank 0 plans, reports and writes.

    Raises:
        UserError: what is wrong with configuration, data, plan or output folder, before training wherever it can be known.
    """
    rank = this_rank(config.device)
    check_num_ranks(config, rank.world_size)
    console = Console() if rank.is_first else None
    if console and config.train.precision == "bf16" and rank.device.type == "cpu" and not _cpu_has_bf16():
        console.print(
            "note: this CPU has no bf16 instructions; train.precision=bf16 will be several times slower than fp32"
        )
    prepared = prepare(config, rank) if rank.is_first else None
    torch.manual_seed(config.seed * 1_000_003 + rank.index)  # dropout's; weights have generators of their own
    with process_group(rank):
        prepared = from_first_rank(prepared)
        board = Board(prepared.run_dir if rank.is_first else None)
        try:
            return _train(config, rank, prepared, board, console)
        finally:
            board.close()


def prepare(config: RunConfig, rank: Rank) -> Prepared:
    """Checks data, plan and output folder; writes config.yaml and plan.json there."""
    for split in ("train", "eval"):
        source = open_source(config.data, config.features, split, config.seed)
        if source is not None and not isinstance(source, SyntheticSource):  # what is generated cannot be bad
            preflight(source, config.data.preflight_rows)
    plan = make_plan(config, rank)
    run_dir = _make_run_dir(config)
    save_plan(plan, run_dir / "plan.json")
    return Prepared(plan, run_dir)


def make_plan(config: RunConfig, rank: Rank) -> Plan:
    """The plan that `sharding.plan` names, or a new one for ranks like this."""
    if config.sharding.replica_groups > 1:
        raise ConfigError(
            f"sharding.replica_groups is {config.sharding.replica_groups}, which can be planned but not trained yet: TorchRec 1.8.0's "
            "DMPCollection runs on CUDA and MTIA only, and no test here has one; set it to 1"
        )
    model = build_model(config, dense_device=torch.device("meta"))  # also where features that do not suit the arch show
    request = plan_request(config, _cluster(config, rank), model.num_dense_parameters)
    if config.sharding.plan is not None:
        return load_plan(config.sharding.plan, request)
    try:
        return find_plan(request, seed=config.seed).plan
    except NoPlanError as e:
        raise NoPlanError(
            f"{e}\n  what would make it fit (fp16, more types, host memory, more hosts): python -m tools.plan_sharding tries it"
        ) from None


def _cluster(config: RunConfig, rank: Rank) -> ClusterSpec:
    ranks = rank.world_size, rank.ranks_per_host, rank.device.type
    if config.sharding.cluster is None:
        return this_cluster(*ranks)
    cluster = load_cluster(config.sharding.cluster)
    check_ranks(cluster, config.sharding.cluster, *ranks)
    return cluster


def _make_run_dir(config: RunConfig) -> Path:
    started = datetime.now().strftime("%Y%m%d-%H%M%S")
    unknown = set(re.findall(r"{.*?}", config.output.dir)) - {"{name}", "{time}"}
    if unknown:
        raise ConfigError(f"output.dir has {', '.join(sorted(unknown))}; what is filled in is {{name}} and {{time}}")
    run_dir = Path(config.output.dir.replace("{name}", config.name).replace("{time}", started))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            raise FileExistsError
        with (run_dir / "config.yaml").open("x") as f:  # of two runs that begin at once, one gets the folder
            f.write(f"# fingerprint {fingerprint(config)}\n{dump_config(config)}")
        records = Path(config.output.records)
        records.parent.mkdir(parents=True, exist_ok=True)
        records.open("a").close()
    except FileExistsError:
        raise ConfigError(
            f"output.dir {run_dir} is not a new or empty folder; name another: output.dir=runs/another"
        ) from None
    except OSError as e:
        raise ConfigError(
            f"cannot write to {e.filename or run_dir}: {e.strerror}; name another place: output.dir=... output.records=..."
        ) from None
    return run_dir


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _train(config: RunConfig, rank: Rank, prepared: Prepared, board: Board, console: Console | None) -> TrainResult:
    train_source = open_source(config.data, config.features, "train", config.seed)
    eval_source = open_source(config.data, config.features, "eval", config.seed)
    train_reader = TrainReader(config, rank, train_source)
    eval_reader = EvalReader(config, rank, eval_source) if eval_source is not None else None
    model = build_model(config, dense_device=rank.device)
    sharded = shard_model(model, prepared.plan, config.train.sparse, rank.device, config.seed)
    if console:
        print_start(console, config, prepared.plan, prepared.run_dir, train_reader.num_steps)
        board.text("config", f"fingerprint {fingerprint(config)}\n```yaml\n{dump_config(config)}```")
        board.text("plan", _markdown(prepared.plan))
    with Progress(console, train_reader.num_steps) as progress:
        result = Trainer(config, rank, sharded, train_reader, eval_reader, board, progress).train()
    memory: list[dict[str, int]] | None = [{}] * rank.world_size if rank.is_first else None
    dist.gather_object(peak_memory_bytes(rank.device), memory, dst=0)
    if console and memory is not None:
        oracle = oracle_metrics(config, eval_source) if isinstance(eval_source, SyntheticSource) else None
        cluster = this_cluster(rank.world_size, rank.ranks_per_host, rank.device.type)
        record = run_record(config, cluster, prepared.plan, result, memory, oracle)
        append_record(config.output.records, record)
        print_end(console, config, result, oracle, prepared.run_dir)
    return result


def oracle_metrics(config: RunConfig, source: SyntheticSource) -> Metrics:
    """The metrics of the true probabilities on the held-out samples: what a perfect model would get."""
    num_rows = min(int(source.block_starts[-1]), config.eval.max_samples or int(source.block_starts[-1]))
    blocks = [source.read_block(b) for b in range(len(source.block_starts) - 1) if source.block_starts[b] < num_rows]
    labels_RT, weights_R, groups_R = (
        np.concatenate([getattr(block, name) for block in blocks])[:num_rows]
        for name in ("labels_RT", "weights_R", "groups_R")
    )
    probabilities_RT = source.oracle_probabilities_RT()[:num_rows]
    logits_RT = np.log(probabilities_RT) - np.log1p(-probabilities_RT)
    groups = groups_R if config.features.group else None
    return {
        label: binary_metrics(logits_RT[:, t], labels_RT[:, t], weights_R, groups)
        for t, label in enumerate(config.features.labels)
    }


def _markdown(plan: Plan) -> str:
    lines = [f"fingerprint {plan.fingerprint}", "", "| table | rows x dim | sharding | ranks |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in plan.summary_rows()]
    lines += ["", "| rank | bytes | predicted ms |", "|---|---|---|"]
    lines += [
        f"| {i} | {r.total_device_bytes:,.0f} | {sum(r.step_ms.values()):.3f} |" for i, r in enumerate(plan.ranks)
    ]
    return "\n".join(lines)
