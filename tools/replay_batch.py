"""Runs a kept batch again, on one CPU process, and says where its numbers first stop being finite.

python -m tools.replay_batch runs/quickstart/20260102-030405/bad_batches/step_17_rank_1.pt
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import fingerprint, load_config, parse_config
from dlrm_scale.errors import ConfigError, UserError, first_lines
from dlrm_scale.libraries import loading_libraries

with loading_libraries():
    import torch
    from torch import Tensor, nn
    from torchrec.sparse.jagged_tensor import JaggedTensor

    from dlrm_scale.data.batch import RecBatch
    from dlrm_scale.models import length_chunks
    from dlrm_scale.models.kernels import with_torch_pffn
    from dlrm_scale.models.ranking_model import RankingModel, build_model
    from dlrm_scale.sharding.apply import MODULE_PATHS, fill_shard
    from dlrm_scale.training.bad_batches import load_bad_batch
    from dlrm_scale.training.checkpoints import checkpoint_folder
    from dlrm_scale.training.run_folder import differences
    from tools.checkpoint.export import load_exported

SHOWN_DIFFERENCES = 20


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.replay_batch",
        description="Rebuild the model, unsharded and on the CPU, and run a batch that was not finite through it. "
        "Exit code 0: all is finite here; 1: something is not, or a file cannot be used; 2: --config cannot.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a file of a run's bad_batches/")
    parser.add_argument("--config", help="another configuration than the one in the file, of the same features")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FOLDER",
        help="run it with the weights that `python -m tools.checkpoint export` wrote there; else with the initial ones",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        saved, batch = load_bad_batch(args.file)
        kept = parse_config(json.loads(saved["config"]), str(args.file))
        config = load_same_features(args.config, kept, args.file) if args.config else kept
        model = rebuild(config, args.weights)
        found = not_finite(config, model, batch)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    seen = "; ".join(f"rank {rank}: {', '.join(parts)}" for rank, parts in saved["seen"].items())
    print(f"step {saved['step']}, rank {saved['rank']} of {saved['world_size']}, config {saved['config_fingerprint']}")
    if fingerprint(config) != saved["config_fingerprint"]:
        print(f"note: replayed with another configuration, {fingerprint(config)}")
    print(f"in the run, not finite: {seen}")
    weights = args.weights or f"initial, of seed {config.seed}"
    print(f"here, with weights {weights}: " + ("all is finite" if not found else f"first not finite: {found[0]}"))
    for place in found[1:11]:
        print(f"  then {place}")
    if not found and not args.weights:
        print(f"the weights at that step may matter; {commands_with_weights(args, kept, saved['step'])}")
    return 1 if found else 0


def load_same_features(path: str, kept: RunConfig, file: Path) -> RunConfig:
    """A configuration that the kept batch is one of too: with other features, the model lacks inputs or drops some.

    Raises:
        ConfigError: it is not valid, or its features are not those of the kept batch, with each difference.
    """
    config = load_config(path)
    lines = differences(*({"features": c.model_dump(mode="json")["features"]} for c in (kept, config)))
    if lines:
        raise ConfigError(
            f"--config {path} has other features than the batch in {file} was kept with:{first_lines(lines, SHOWN_DIFFERENCES)}"
            "\nleave out --config to replay with the run's own, or give its `features` as they are there; all else may differ"
        )
    return config


def commands_with_weights(args: argparse.Namespace, kept: RunConfig, step: int) -> str:
    """What exports the weights nearest to those at that step and replays with them; RUN_DIR where the run's folder is not known."""
    folder = args.file.parent if args.file.parent.name else args.file.absolute().parent
    run_dir = str(folder.parent) if folder.name == "bad_batches" else None
    where, source, output = _nearest_checkpoint(kept, run_dir, step)
    handlers = [f"--path-handler={handler}" for handler in kept.checkpoint.path_handlers]
    config = ["--config", args.config] if args.config else []
    export = ["tools.checkpoint", *handlers, "export", source, "--output", output]
    replay = ["tools.replay_batch", str(args.file), *config, "--weights", output]
    return f"with those of {where}: " + " && ".join(shlex.join(["python", "-m", *c]) for c in (export, replay))


def _nearest_checkpoint(kept: RunConfig, run_dir: str | None, step: int) -> tuple[str, str, str]:
    """(what it is, its path, a name for its weights): the last one before the step, else the first after it."""
    any_of_them = ("a checkpoint of the run", kept.checkpoint.dir.replace("{run}", run_dir or "RUN_DIR"), "weights")
    if run_dir is None and "{run}" in kept.checkpoint.dir:
        return any_of_them
    try:
        folder = checkpoint_folder(kept, run_dir or "")
        steps = sorted(folder.steps())
    except (UserError, OSError):  # its store is not within reach from here: the commands are still those
        return any_of_them
    if not steps:
        return f"a checkpoint ({folder.path} holds none here)", folder.path, "weights"
    # after so many steps, a checkpoint has the weights that the 0-based step of that number begins with
    before = [done for done in steps if done <= step]
    nearest = before[-1] if before else steps[0]
    which = "the last checkpoint before it" if before else "the first checkpoint after it (none is left from before)"
    return which, folder.path_of(nearest), f"weights_step_{nearest}"


def rebuild(config: RunConfig, weights: Path | None) -> RankingModel:
    """The run's model on one CPU process, with its initial weights or those of a folder that tools.checkpoint exported.

    Raises:
        DataError: the folder does not hold this model's weights.
    """
    cpu, config = torch.device("cpu"), _plain(config)
    model = build_model(config, table_device=cpu, dense_device=cpu)
    tables = {name: model.get_parameter(_table_path(config, name)).data for name in config.features.tables}
    if weights is not None:
        load_exported(weights, tables, {name: p.data for name, p in model.dense.named_parameters()})
        return model
    for name, weight in tables.items():
        fill_shard(weight, name, 0, 0, *weight.shape, config.seed)
    return model


def _table_path(config: RunConfig, table: str) -> str:
    in_sequence = table in config.features.sequence_tables
    inner = "embeddings" if in_sequence else "embedding_bags"
    return f"{MODULE_PATHS['sequences' if in_sequence else 'bags']}.{inner}.{table}.weight"


def _plain(config: RunConfig) -> RunConfig:
    """The same model without what only saves time or memory: it may need a GPU or a compiler, or runs layers twice."""
    off = {"compile": False, "activation_checkpointing": False}
    return with_torch_pffn(config).model_copy(update={"train": config.train.model_copy(update=off)})


def not_finite(config: RunConfig, model: RankingModel, batch: RecBatch) -> list[str]:
    """Places with a number that is not finite, in the order in which they are computed."""
    found = [f"dense feature {f.name}: {_rows(batch.dense_BF[:, i])}" for i, f in enumerate(config.features.dense)]
    found += [f"label {name}: {_rows(batch.labels_BT[:, t])}" for t, name in enumerate(config.features.labels)]
    found.append(f"the samples' weights: {_rows(batch.weights_B)}")
    found += [f"table {name}: {_rows(p)}" for name, p in model.named_parameters() if name.startswith("embeddings.")]
    found += [f"parameter {n}: {_rows(p)}" for n, p in model.named_parameters() if not n.startswith("embeddings.")]
    found = [place for place in found if not place.endswith(": ")]

    embedded: list[JaggedTensor] = []
    model.dense.arch.register_forward_pre_hook(lambda arch, args: embedded.extend((args[2] or {}).values()))

    def watch(name: str, module: nn.Module) -> None:
        def after(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            # what takes all events of a field, one a row, gives rows of events
            offsets_B1 = next((f.offsets() for f in embedded if any(arg is f.values() for arg in args)), None)
            if isinstance(output, Tensor) and (rows := _rows(output, offsets_B1)):
                found.append(f"output of {name}: {rows}")

        module.register_forward_hook(after)

    for name, module in model.named_modules():
        if name and not name.startswith("embeddings"):
            watch(name, module)
    with _in_the_batchs_order():
        loss, _ = model(batch)
    if not torch.isfinite(loss):
        found.append(f"the loss: {loss.item()}")
    loss.backward()
    # a parameter that the batch does not reach has no gradient
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return found + [f"gradient of {name}: {rows}" for name, g in reversed(gradients) if (rows := _rows(g))]


@contextmanager
def _in_the_batchs_order() -> Iterator[None]:
    """Has InterFormer take the batch as one chunk: else it sorts samples by length, and hooks would see rows of a chunk."""
    usual, length_chunks.CHUNK_SAMPLES = length_chunks.CHUNK_SAMPLES, sys.maxsize
    try:
        yield
    finally:
        length_chunks.CHUNK_SAMPLES = usual


@torch.no_grad()
def _rows(values: Tensor, offsets_B1: Tensor | None = None) -> str:
    """Where a tensor is not finite, by its first dimension, or, if that is of events, by sample and event; empty where it is."""
    if not values.dim():
        return "" if torch.isfinite(values) else f"{values.item()}"
    bad = (
        (~torch.isfinite(values.reshape(len(values), -1))).any(dim=1).nonzero().flatten().tolist()
        if values.numel()
        else []
    )
    shown = [str(row) if offsets_B1 is None else _sample_and_event(row, offsets_B1) for row in bad[:5]]
    return f"rows {', '.join(shown)}{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}" if bad else ""


def _sample_and_event(row: int, offsets_B1: Tensor) -> str:
    sample = int(torch.searchsorted(offsets_B1, row, right=True)) - 1
    return f"{sample} (event {row - int(offsets_B1[sample])})"


if __name__ == "__main__":
    sys.exit(main())
