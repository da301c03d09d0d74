"""One run from its configuration to its record: check and plan on rank 0, then train on all ranks."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.manifest import Manifest
from dlrm_scale.cluster import this_cluster
from dlrm_scale.config import RunConfig, check_num_ranks
from dlrm_scale.config_io import dump_config, fingerprint
from dlrm_scale.data.open import open_source, preflight
from dlrm_scale.data.synthetic import SyntheticSource
from dlrm_scale.errors import CheckpointError, NoPlanError
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.plan import Plan, PlanRequest, load_plan, plan_request, save_plan
from dlrm_scale.sharding.planner import find_plan
from dlrm_scale.training.checkpoints import RunCheckpoints, checkpoint_folder
from dlrm_scale.training.metrics import binary_metrics
from dlrm_scale.training.monitor import Board, Metrics, peak_memory_bytes
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import Rank, from_first_rank, process_group, this_rank
from dlrm_scale.training.readers import EvalReader, TrainReader
from dlrm_scale.training.report import print_end, print_start, record_line, run_record
from dlrm_scale.training.result import TrainResult
from dlrm_scale.training.run_folder import RunFolder, refuse_differences
from dlrm_scale.training.state import seed_generators
from dlrm_scale.training.trainer import Trainer


@dataclass(frozen=True)
class Prepared:
    """What rank 0 finds out before the process group exists, and tells the others; without a plan, the run is finished."""

    run_dir: Path
    plan: Plan | None


def run(config: RunConfig) -> TrainResult | None:
    """Trains `config`, from its newest checkpoint if it has one; None if it has been trained. Every rank calls it; rank 0
    plans, reports and writes.

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
    folder = RunFolder(config) if rank.is_first else None
    try:
        prepared = prepare(config, rank, folder) if folder else None
        seed_generators(config.seed, rank, 0)
        with process_group(rank):
            prepared = from_first_rank(prepared)
            if prepared.plan is None:
                if console:
                    console.print(f"{prepared.run_dir} is finished: nothing to do", highlight=False)
                return None
            return _train(config, rank, prepared, folder, console)
    finally:
        if folder:
            folder.close()


def prepare(config: RunConfig, rank: Rank, folder: RunFolder) -> Prepared:
    """Checks data, plan and output folder; writes config.yaml and plan.json there."""
    if folder.is_finished():
        return Prepared(folder.path, None)
    for split in ("train", "eval") if not folder.holds_run else ():  # a run that goes on has read them
        source = open_source(config.data, config.features, split, config.seed)
        if source is not None and not isinstance(source, SyntheticSource):  # what is generated cannot be bad
            preflight(source, config.data.preflight_rows)
    plan = make_plan(config, rank, _newest_plan(checkpoint_folder(config, str(folder.path))))
    folder.claim()
    return Prepared(folder.path, plan)


def make_plan(config: RunConfig, rank: Rank, earlier: Plan | None = None) -> Plan:
    """The plan that `sharding.plan` names; or `earlier`, if it answers the same request; or a new one for ranks like this."""
    model = build_model(config, dense_device=torch.device("meta"))  # also where features that do not suit the arch show
    cluster = this_cluster(rank.world_size, rank.ranks_per_host, rank.device.type)
    request = plan_request(config, cluster, model.num_dense_parameters)
    if config.sharding.plan is not None:
        return load_plan(config.sharding.plan, request)
    if earlier is not None and answers(earlier, request):
        return earlier
    try:
        return find_plan(request, seed=config.seed).plan
    except NoPlanError as e:
        raise NoPlanError(
            f"{e}\n  what would make it fit (fp16, more types, host memory, more hosts): python -m tools.plan_sharding tries it"
        ) from None


def answers(plan: Plan, request: PlanRequest) -> bool:
    """Whether a plan was asked for by the same request, but for the machine's figures, which differ from host to host."""
    cluster, now = plan.request.cluster, request.cluster
    same_ranks = all(getattr(cluster, f) == getattr(now, f) for f in ("device", "num_ranks", "ranks_per_host"))
    return same_ranks and plan.request.model_copy(update={"cluster": now}) == request


def _newest_plan(folder: CheckpointFolder) -> Plan | None:
    """The plan of the newest checkpoint whose manifest can be read; a resumed run keeps it, so that it ends with the same bits."""
    for step in folder.steps():
        try:
            return _plan_of(folder.manifest(step))
        except CheckpointError:  # `choose` will tell of it
            continue
    return None


def _plan_of(manifest: Manifest) -> Plan:
    return Plan.model_validate_json(json.dumps(manifest.plan))


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _train(
    config: RunConfig, rank: Rank, prepared: Prepared, folder: RunFolder | None, console: Console | None
) -> TrainResult:
    def tell(line: str) -> None:
        if console:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    step_folder = checkpoint_folder(config, str(prepared.run_dir))
    checkpoints = RunCheckpoints(config, rank, step_folder, tell)
    try:
        plan, resumed = prepared.plan, checkpoints.resumed
        if resumed is not None:
            refuse_differences(resumed.config, config.model_dump(mode="json"), step_folder.path)
            saved_plan = _plan_of(resumed)  # of an older one than the newest, if that was skipped
            plan = saved_plan if config.sharding.plan is None and answers(saved_plan, plan.request) else plan
        board = Board(prepared.run_dir if rank.is_first else None, resumed.step if resumed else None)
        checkpoints.attach(plan, board)
        try:
            return _train_model(config, rank, plan, folder, console, checkpoints, board)
        finally:
            board.close()
    finally:
        checkpoints.saver.drain()


def _train_model(
    config: RunConfig,
    rank: Rank,
    plan: Plan,
    folder: RunFolder | None,
    console: Console | None,
    checkpoints: RunCheckpoints,
    board: Board,
) -> TrainResult:
    train_source = open_source(config.data, config.features, "train", config.seed)
    eval_source = open_source(config.data, config.features, "eval", config.seed)
    train_reader = TrainReader(config, rank, train_source)
    eval_reader = EvalReader(config, rank, eval_source) if eval_source is not None else None
    model = build_model(config, dense_device=rank.device)
    sharded = shard_model(model, plan, config.train.sparse, rank.device, config.seed)
    if folder:
        save_plan(plan, folder.path / "plan.json")
        print_start(console, config, plan, folder.path, train_reader.num_steps)
        board.text("config", f"fingerprint {fingerprint(config)}\n```yaml\n{dump_config(config)}```")
        board.text("plan", _markdown(plan))
    with Progress(console, train_reader.num_steps) as progress:
        trainer = Trainer(config, rank, sharded, train_reader, eval_reader, board, progress, checkpoints)
        result = trainer.train()
    memory: list[dict[str, int]] | None = [{}] * rank.world_size if rank.is_first else None
    dist.gather_object(peak_memory_bytes(rank.device), memory, dst=0)
    if folder and memory is not None:
        oracle = oracle_metrics(config, eval_source) if isinstance(eval_source, SyntheticSource) else None
        cluster = this_cluster(rank.world_size, rank.ranks_per_host, rank.device.type)
        folder.finish(record_line(run_record(config, cluster, plan, result, memory, oracle)))
        print_end(console, config, result, oracle, folder.path)
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
