"""One run from its configuration to its record: check and plan on rank 0, then train on all ranks."""

import json
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import is_local
from dlrm_scale.checkpoint.manifest import Manifest
from dlrm_scale.cluster import ClusterSpec, check_ranks, load_cluster, this_cluster
from dlrm_scale.config import RunConfig, check_num_ranks
from dlrm_scale.config_io import dump_config, fingerprint, parse_config
from dlrm_scale.data.open import open_source, preflight
from dlrm_scale.data.synthetic import SyntheticSource
from dlrm_scale.errors import CheckpointError, ConfigError, DivergedError, NoPlanError, RollbackRequested
from dlrm_scale.meta import META
from dlrm_scale.models.dense_trace import trace_dense
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.resilience.account import Account, Attempt, next_attempt
from dlrm_scale.resilience.goodput import EVENTS, EventLog, last_saved_step
from dlrm_scale.resilience.preemption import Preemption
from dlrm_scale.resilience.watchdog import Watchdog
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.memory import dense_bytes, reserved_bytes
from dlrm_scale.sharding.plan import Plan, PlanRequest, load_plan, plan_request, rule_differences, save_plan
from dlrm_scale.sharding.planner import find_plan
from dlrm_scale.training.checkpoints import RunCheckpoints, checkpoint_folder
from dlrm_scale.training.device import check_caches, check_device
from dlrm_scale.training.keepers import Keepers
from dlrm_scale.training.metrics import binary_metrics
from dlrm_scale.training.monitor import Board, Metrics, peak_memory_bytes
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import Rank, from_first_rank, process_group, this_rank
from dlrm_scale.training.readers import EvalReader, TrainReader
from dlrm_scale.training.report import print_end, print_start, record_line, run_record
from dlrm_scale.training.result import TrainResult
from dlrm_scale.training.run_folder import RunFolder, how_to_go_on, refuse_differences
from dlrm_scale.training.state import seed_generators
from dlrm_scale.training.trainer import Trainer


@dataclass(frozen=True)
class Prepared:
    """What rank 0 finds out before the process group exists, and tells the others; without a plan, the run is finished."""

    run_dir: Path
    plan: Plan | None
    left_out_steps: set[int] = field(default_factory=set)


def run(config: RunConfig, preemption: Preemption | None = None, started_at: float | None = None) -> TrainResult | None:
    """Trains `config`, from its newest checkpoint if it has one, until its end or until `preemption` is requested; None if it
    has been trained to its end before. Every rank calls it; rank 0 plans, reports and writes.

    Args:
        started_at: Unix time at which the process began; None: now.

    Raises:
        UserError: what is wrong with configuration, data, plan or output folder, before training wherever it can be known.
    """
    rank = this_rank(config.device)
    check_num_ranks(config, rank.world_size)
    check_device(config, rank.device)
    console = Console() if rank.is_first else None
    if console and config.train.precision == "bf16" and rank.device.type == "cpu" and not cpu_has_bf16():
        console.print(
            "note: this CPU has no bf16 instructions; train.precision=bf16 will be several times slower than fp32"
        )
    limits = config.resilience
    watchdog = Watchdog(rank.index, rank.world_size, limits.watchdog_seconds, limits.watchdog_long_seconds)
    folder = RunFolder(config) if rank.is_first else None
    try:
        with watchdog:
            watchdog.enter("plan")
            prepared = prepare(config, rank, folder) if folder else None
            seed_generators(config.seed, rank, 0)
            with process_group(rank):
                prepared = from_first_rank(prepared)
                watchdog.enter("start")
                if prepared.plan is None:
                    if console:
                        console.print(f"{prepared.run_dir} is finished: nothing to do", highlight=False)
                    return None
                watchdog.folder = prepared.run_dir / "hung"
                job = Job(config, rank, prepared, folder, console, watchdog, preemption, started_at or time.time())
                return _train_or_roll_back(job)
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
    checkpoints = checkpoint_folder(config, str(folder.path))
    if is_local(checkpoints.path):
        folder.hold(Path(checkpoints.path))
    if (saved := last_saved_step(folder.path)) and not checkpoints.steps():
        print(
            f"warning: a save of step {saved:,} was begun here, but {checkpoints.path} holds no checkpoint any more: training begins anew",
            flush=True,
        )
    if config.train.pipeline == "prefetch" and (steps := folder.left_out()):
        raise ConfigError(
            f"train.pipeline is prefetch, but this run leaves out step {', '.join(map(str, sorted(steps)))} (train.nonfinite=rollback), and a micro-batch "
            "that is dropped would leave its rows locked in FBGEMM's caches; set train.pipeline=sparse_dist"
        )
    plan = make_plan(config, rank, _newest_plan(checkpoints))
    if warning := _too_many_activations(config, plan, _cluster(config, rank)):
        print(f"warning: {warning}", flush=True)
    folder.claim()
    return Prepared(folder.path, plan, folder.left_out())


def make_plan(config: RunConfig, rank: Rank, earlier: Plan | None = None) -> Plan:
    """As `_choose_plan`, and checked to be one that can train."""
    plan = _choose_plan(config, rank, earlier)
    check_caches(config.train, plan)
    return plan


def _choose_plan(config: RunConfig, rank: Rank, earlier: Plan | None) -> Plan:
    """The plan that `sharding.plan` names; or `earlier`, if it answers the same request; or a new one for ranks like this."""
    if config.sharding.replica_groups > 1:
        raise ConfigError(
            f"sharding.replica_groups is {config.sharding.replica_groups}, which can be planned but not trained yet: TorchRec 1.8.0's "
            "DMPCollection runs on CUDA and MTIA only, and no test here has one; set it to 1"
        )
    model = build_model(config, dense_device=META)  # also where features that do not suit the arch show
    request = plan_request(config, _cluster(config, rank), model.num_dense_parameters)
    if config.sharding.plan is not None:
        plan = load_plan(config.sharding.plan, request)
        if differences := rule_differences(plan.request, request):
            print(
                f"note: {config.sharding.plan} is followed as it is, though it was made under other rules:", flush=True
            )
        for difference in differences:
            print(f"  {difference}", flush=True)
        return plan
    if earlier is not None and answers(earlier, request):
        return earlier
    try:
        return find_plan(request, seed=config.seed).plan
    except NoPlanError as e:
        raise NoPlanError(
            f"{e}\n  what would make it fit (fp16, more types, host memory, more hosts): python -m tools.plan_sharding tries it"
        ) from None


def _too_many_activations(config: RunConfig, plan: Plan, cluster: ClusterSpec) -> str | None:
    """What to say where a micro-batch takes more memory than the plan leaves. No reason to refuse it: sequences may be shorter."""
    train = config.train
    batch_size = train.global_batch_size // train.accumulate_steps // cluster.num_ranks
    trace = trace_dense(config, batch_size, cluster.device)
    # a plan that is replayed may be of another batch or arch
    request = plan_request(config, cluster, trace.num_parameters)
    of_dense = dense_bytes(request)
    of_tables = max(sum(n for kind, n in load.device_bytes.items() if kind not in of_dense) for load in plan.ranks)
    held, room = of_tables + sum(of_dense.values()), cluster.table_bytes_per_rank - reserved_bytes(request)
    if held + trace.activation_bytes <= room:
        return None
    ways = "a smaller train.global_batch_size or more train.accumulate_steps"
    if config.model.arch == "interformer" and not train.activation_checkpointing:
        ways += ", or train.activation_checkpointing=true,"
    full = " with full sequences" if config.features.sequences else ""
    return (
        f"memory may run out: tables and dense arch take {held / 1e9:.1f} GB of the {room / 1e9:.1f} GB that a rank has beside "
        f"sharding.storage_reserve, and {batch_size:,} samples{full} keep {trace.activation_bytes / 1e9:.1f} GB for the backward pass; "
        f"{ways} keeps less"
    )


def _cluster(config: RunConfig, rank: Rank) -> ClusterSpec:
    ranks = rank.world_size, rank.ranks_per_host, rank.device.type
    if config.sharding.cluster is None:
        return this_cluster(*ranks)
    cluster = load_cluster(config.sharding.cluster)
    check_ranks(cluster, config.sharding.cluster, *ranks)
    return cluster


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


def cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _train_or_roll_back(job: "Job") -> TrainResult:
    """Trains, and with `train.nonfinite=rollback` goes back to the newest checkpoint at each step that is not finite, to leave
    that step out. Every rank comes back here at the same step.

    Raises:
        DivergedError: there is no checkpoint to go back to, or a step that was left out is still not finite.
    """
    while True:
        try:
            return _train(job)
        except RollbackRequested as request:
            folder = checkpoint_folder(job.config, str(job.prepared.run_dir))
            step, left_out = request.step, job.prepared.left_out_steps
            if step in left_out:
                raise DivergedError(f"{request}, though that step was left out") from None
            if from_first_rank(not folder.steps()):
                raise DivergedError(f"{request}; there is no checkpoint to go back to") from None
            left_out.add(step)
            if job.folder:
                job.folder.leave_out(left_out)
                print(f"warning: {request}; going back to the newest checkpoint, to leave out step {step}", flush=True)
            seed_generators(job.config.seed, job.rank, 0)


@dataclass(frozen=True)
class Job:
    """What a rank trains with. `folder` and `console` are rank 0's alone."""

    config: RunConfig
    rank: Rank
    prepared: Prepared
    folder: RunFolder | None
    console: Console | None
    watchdog: Watchdog
    preemption: Preemption | None
    started_at: float

    def tell(self, line: str) -> None:
        if self.console:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _train(job: Job) -> TrainResult:
    config, prepared = job.config, job.prepared
    step_folder = checkpoint_folder(config, str(prepared.run_dir))
    job.watchdog.enter("load")
    checkpoints = RunCheckpoints(config, job.rank, step_folder, job.tell)
    try:
        plan, resumed = prepared.plan, checkpoints.resumed
        if resumed is not None:
            saved = parse_config(resumed.config, step_folder.path)  # with defaults for keys that are newer than it
            refuse_differences(saved.model_dump(mode="json"), config.model_dump(mode="json"), step_folder.path)
            saved_plan = _plan_of(resumed)  # of an older one than the newest, if that was skipped
            plan = saved_plan if config.sharding.plan is None and answers(saved_plan, plan.request) else plan
        board = Board(prepared.run_dir if job.rank.is_first else None, resumed.step if resumed else None)
        checkpoints.attach(plan, board)
        try:
            return _train_model(job, plan, checkpoints, board)
        finally:
            board.close()
    finally:
        checkpoints.saver.drain()


def _train_model(job: Job, plan: Plan, checkpoints: RunCheckpoints, board: Board) -> TrainResult:
    config, rank, folder = job.config, job.rank, job.folder
    train_source = open_source(config.data, config.features, "train", config.seed)
    eval_source = open_source(config.data, config.features, "eval", config.seed)
    train_reader = TrainReader(config, rank, train_source, job.preemption)
    checkpoints.check_reader(train_reader)
    eval_reader = EvalReader(config, rank, eval_source) if eval_source is not None else None
    model = build_model(config, dense_device=rank.device)
    sharded = shard_model(model, plan, config, rank.device)
    if folder:
        save_plan(plan, folder.path / "plan.json")
        print_start(job.console, config, plan, folder.path, train_reader.num_steps)
        board.text("config", f"fingerprint {fingerprint(config)}\n```yaml\n{dump_config(config)}```")
        board.text("plan", _markdown(plan))
    resumed_at = checkpoints.resumed.step if checkpoints.resumed else 0
    account = open_account(job.prepared.run_dir, rank, train_reader, resumed_at)
    with Progress(job.console, train_reader.num_steps) as progress, closing(account):
        events = open_events(job, account.attempt) if folder else None
        keepers = Keepers(job.watchdog, account, checkpoints, events, job.prepared.run_dir, job.prepared.left_out_steps)
        result = Trainer(config, rank, sharded, train_reader, eval_reader, board, progress, keepers).train()
    job.watchdog.enter("eval")  # rank 0 works out the oracle's metrics while the others wait
    if result.preempted:
        dist.barrier()  # no rank ends, and has the launcher end the others, before all have saved
        job.tell(
            f"stopped as asked after step {result.num_steps} of {train_reader.num_steps}; to go on from it: "
            + how_to_go_on(config, job.prepared.run_dir)
        )
        return result
    memory: list[dict[str, int]] | None = [{}] * rank.world_size if rank.is_first else None
    dist.gather_object(peak_memory_bytes(rank.device), memory, dst=0)
    if folder and memory is not None:
        oracle = oracle_metrics(config, eval_source) if isinstance(eval_source, SyntheticSource) else None
        cluster = _cluster(config, rank)
        spent = events.goodput()
        folder.finish(record_line(run_record(config, cluster, plan, result, memory, oracle, spent)))
        print_end(job.console, config, result, oracle, folder.path, spent)
    return result


def open_events(job: Job, attempt: int) -> EventLog:
    """The run's log of events, in a new attempt: the first one of this process began when the process did."""
    events = EventLog(job.prepared.run_dir / EVENTS, attempt)
    earlier = events.events[-1].time if events.events else 0.0
    events.add("start", at=max(job.started_at, earlier))  # after a rollback in this process: from where it went back
    return events


def open_account(run_dir: Path, rank: Rank, reader: TrainReader, resumed_at_step: int) -> Account:
    """This rank's account of its data in a new attempt, whose number rank 0 decides. Collective."""
    folder, order = run_dir / "account", reader.reader.order
    lanes = [order.lane_range(lane) for lane in range(order.lanes)]
    attempt = Attempt(
        attempt=from_first_rank(next_attempt(folder) if rank.is_first else 0),
        rank=rank.index,
        world_size=rank.world_size,
        resumed_at_step=resumed_at_step,
        steps_per_epoch=order.steps_per_epoch,
        lane_batch_size=order.lane_batch_size,
        lane_ranges=[(lane.start, lane.stop) for lane in lanes],
    )
    return Account(folder, attempt, reader.accumulate_steps)


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
