"""Checkpoints of a model without a run: states of known values, saved under one plan and loaded under another."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import Files
from dlrm_scale.checkpoint.manifest import FORMAT, Manifest
from dlrm_scale.checkpoint.saver import Saver
from dlrm_scale.checkpoint.tensors import Part, read_parts, saved_tensors
from dlrm_scale.checkpoint_config import CheckpointConfig
from dlrm_scale.cluster import this_cluster
from dlrm_scale.config import RunConfig
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.local_tables import local_shards
from dlrm_scale.sharding.plan import Plan, plan_request
from dlrm_scale.training.optimizers import TrainOptimizer
from dlrm_scale.training.ranks import this_rank
from dlrm_scale.training.state import ModelState, mismatches
from tests.support.plans import hand_plan

CPU = torch.device("cpu")
STEP = 3


def plan_of(config: RunConfig, world_size: int, ranks_per_host: int, bag_type: str, sequence_type: str) -> Plan:
    request = plan_request(config, this_cluster(world_size, ranks_per_host, "cpu"), 0)
    kinds = {t: sequence_type if spec.collection == "sequences" else bag_type for t, spec in request.tables.items()}
    return hand_plan(request, kinds)


def model_state(config: RunConfig, plan: Plan) -> ModelState:
    model = build_model(config, dense_device=CPU)
    sharded = shard_model(model, plan, config, CPU)
    return ModelState(plan, sharded, TrainOptimizer(sharded, config.train, 100))


def numbers(key: str, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(rows, columns) whole numbers below 1009 that tell where in which tensor they stand."""
    salt = sum(key.encode())
    return ((rows[:, None] * 131 + columns[None] * 17 + salt) % 1009).float()


def stamp(state: ModelState) -> None:
    """Every table, and every state of one, holds `numbers`; a state of one number a row their mean over its columns."""
    with torch.no_grad():
        for shard in local_shards(state.model):
            rows = shard.row + torch.arange(shard.weight.shape[0])
            columns = shard.column + torch.arange(shard.weight.shape[1])
            for name, tensor in {"weight": shard.weight, **shard.states}.items():
                known = numbers(f"{shard.table}/{name}", rows, columns)
                tensor.copy_(known if tensor.dim() == 2 else known.mean(1))
        for table, weight in state.optimizer.replicated_tables.items():
            rows, columns = (torch.arange(n) for n in weight.shape)
            weight.copy_(numbers(f"{table}/weight", rows, columns))
            for name, tensor in state.optimizer.replicated.state[weight].items():
                known = numbers(f"{table}/{name}", rows, columns)
                tensor.copy_(known if tensor.shape == known.shape else known.mean(1, keepdim=True))
        generator = torch.Generator().manual_seed(5)
        for parameter in state.optimizer.dense_parameters:
            parameter.normal_(generator=generator)
            for tensor in state.optimizer.dense.state[parameter].values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def save_stamped(config: RunConfig, plan: Plan, path: str) -> None:
    state = model_state(config, plan)
    stamp(state)
    save_state(state, config, path)


def save_state(state: ModelState, config: RunConfig, path: str) -> None:
    """As it is, as the checkpoint of step STEP."""
    rank = this_rank("cpu")

    def describe(notes: list[Any], files: dict) -> Manifest:
        return Manifest(
            format=FORMAT,
            step=STEP,
            samples_consumed=0,
            data_fingerprint="",
            world_size=rank.world_size,
            config_fingerprint="",
            config=config.model_dump(mode="json"),
            plan=state.plan.model_dump(mode="json"),
            versions={},
            time="2026-01-01T00:00:00+00:00",
            column_blocks=state.column_blocks,
            progress={},
            files=files,
        )

    saver = Saver(CheckpointFolder(path, Files()), CheckpointConfig(mode="sync"), rank.index, print)
    saver.save(STEP, state.parts(rank), None, describe)
    saver.finish()


def load_each(config: RunConfig, plan: Plan, paths: list[str]) -> dict[str, list[str]]:
    """By path, what is not as it must be on this rank after that checkpoint was loaded into a model of `plan`."""
    state = model_state(config, plan)
    wrong = {}
    for path in paths:
        folder = CheckpointFolder(path, Files())
        manifest, where = folder.manifest(STEP), folder.path_of(STEP)
        saved = saved_tensors(where, folder.files)
        faults = mismatches(saved, state.expected(manifest.column_blocks))
        if not faults:
            spoil(state)
            reading = state.reading(saved, manifest.column_blocks, set())
            read_parts(where, reading.targets, folder.files, dist.group.WORLD)
            reading.finish()
            faults = differences(state, where, folder.files, manifest)
        wrong[path] = faults
    return wrong


def spoil(state: ModelState) -> None:
    with torch.no_grad():
        for part in state.parts(this_rank("cpu")):
            part.tensor.fill_(-7)
        for parameter in (*state.optimizer.dense_parameters, *state.optimizer.replicated_tables.values()):
            parameter.fill_(-7)


def differences(state: ModelState, where: str, files: Files, manifest: Manifest) -> list[str]:
    """Against the numbers that were saved, each column of a row-wise state having the value of its block."""
    wrong = []

    def compare(key: str, mine: torch.Tensor, expected: torch.Tensor, exact: bool = True) -> None:
        close = torch.equal(mine, expected) if exact else torch.allclose(mine, expected, rtol=1e-6, atol=0)
        if not close:
            wrong.append(f"{key}: off by up to {(mine - expected).abs().max().item()}")

    held = [(s.table, s.row, s.column, s.weight, s.states) for s in local_shards(state.model)]
    for table, weight in state.optimizer.replicated_tables.items():
        states = {n: t[:, 0] if t.shape[1] == 1 else t for n, t in state.optimizer.replicated.state[weight].items()}
        held.append((table, 0, 0, weight.detach(), states))
    for table, row, column, weight, states in held:
        rows, columns = row + torch.arange(weight.shape[0]), column + torch.arange(weight.shape[1])
        starts = torch.tensor(manifest.column_blocks[table])
        all_columns = torch.arange(state.plan.request.tables[table].embedding_dim)
        block_of = torch.searchsorted(starts, all_columns, right=True) - 1
        for name, tensor in {"weight": weight, **states}.items():
            key = f"{table}/{name}"
            if tensor.dim() == 2:
                compare(key, tensor, numbers(key, rows, columns))
                continue
            means = torch.stack([numbers(key, rows, all_columns[block_of == b]).mean(1) for b in range(len(starts))], 1)
            spread = means[:, block_of][:, columns]
            same_cut = len(set(block_of[columns].tolist())) == 1
            compare(key, tensor, spread[:, 0] if same_cut else spread.double().mean(1).float(), exact=same_cut)
    generator = torch.Generator().manual_seed(5)
    for number, parameter in enumerate(state.optimizer.dense_parameters):
        for tensor in (parameter.detach(), *state.optimizer.dense.state[parameter].values()):
            expected = torch.empty_like(tensor).normal_(generator=generator)
            compare(f"dense {number}", tensor, expected)
    return wrong


def tensor_of(path: str | Path, key: str) -> torch.Tensor:
    files = Files()
    saved = saved_tensors(str(path), files)[key]
    tensor = torch.empty(saved.size, dtype=saved.dtype)
    read_parts(str(path), [Part.whole(key, tensor)], files)
    return tensor
