"""The prediction window against the metrics of hand-picked rows, and TensorBoard's files as TensorBoard reads them."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dlrm_scale.models.ranking_model import Predictions
from dlrm_scale.training.metrics import binary_metrics
from dlrm_scale.training.monitor import Board, PredictionStore, peak_memory_bytes, percentiles
from dlrm_scale.training.ranks import Rank

LABELS = ("click", "buy")
RANK = Rank(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield RANK
    dist.destroy_process_group()


def random_predictions(num_rows: int, seed: int) -> Predictions:
    """Two tasks that differ in logits and base rate, uneven weights with a padded row, three groups."""
    generator = torch.Generator().manual_seed(seed)
    labels_BT = (torch.rand(num_rows, 2, generator=generator) < torch.tensor([0.6, 0.3])).float()
    logits_BT = torch.randn(num_rows, 2, generator=generator) + torch.tensor([1.0, -1.0]) * labels_BT
    weights_B = torch.rand(num_rows, generator=generator) + 0.1
    weights_B[-1] = 0.0
    return Predictions(logits_BT, labels_BT, weights_B, torch.randint(0, 3, (num_rows,), generator=generator))


def metrics_of(batches: list[Predictions], with_groups: bool) -> dict[str, dict[str, float]]:
    logits, labels, weights, groups = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    return {
        label: binary_metrics(logits[:, t], labels[:, t], weights, groups if with_groups else None)
        for t, label in enumerate(LABELS)
    }


@pytest.mark.parametrize("with_groups", [True, False])
def test_store_without_limit_scores_each_label_over_all_batches(one_rank, with_groups):
    batches = [random_predictions(num_rows, seed) for seed, num_rows in enumerate((60, 40, 50))]
    store = PredictionStore(LABELS, with_groups, max_local_rows=None)
    for batch in batches:
        store.add(batch)
    metrics = store.metrics(one_rank)
    assert metrics == metrics_of(batches, with_groups)
    assert abs(metrics["click"]["auc"] - metrics["buy"]["auc"]) > 0.1
    assert ("gauc" in metrics["click"]) is with_groups


def test_window_holds_the_latest_whole_batches_that_reach_its_size(one_rank):
    store, batches = PredictionStore(LABELS, True, max_local_rows=120), []
    # rows of each batch, and how many of the latest batches reach 120 rows (or are all there are)
    for num_rows, num_kept in ((100, 1), (40, 2), (70, 3), (90, 2), (50, 2), (70, 2), (200, 1), (30, 2)):
        batches.append(random_predictions(num_rows, seed=len(batches)))
        store.add(batches[-1])
        kept = batches[-num_kept:]
        assert store.metrics(one_rank) == metrics_of(kept, with_groups=True), f"after batch {len(batches)}"
        num_kept_rows = sum(len(b.weights_B) for b in kept)
        assert num_kept_rows >= 120 or kept == batches
        assert num_kept_rows < 120 + max(len(b.weights_B) for b in kept)


def test_store_without_a_batch_has_no_metrics(one_rank):
    assert PredictionStore(LABELS, True, max_local_rows=None).metrics(one_rank) == {}


def test_board_writes_what_tensorboard_reads(tmp_path):
    board = Board(tmp_path)
    board.scalars("speed", {"samples_per_s": 250.0}, 5)
    board.scalars("speed", {"samples_per_s": 500.0}, 10)
    board.metrics("eval", {"click": {"ne": 0.5}, "buy": {"ne": 0.75, "auc": 0.625}}, 10)
    board.text("plan", "all tables on rank 0")
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {
        "speed/samples_per_s": [(5, 250.0), (10, 500.0)],
        "eval/click/ne": [(10, 0.5)],
        "eval/buy/ne": [(10, 0.75)],
        "eval/buy/auc": [(10, 0.625)],
    }
    [text] = [events.Tensors(tag) for tag in events.Tags()["tensors"]]
    assert text[0].tensor_proto.string_val[0] == b"all tables on rank 0"


def test_board_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    board = Board(None)
    board.scalars("train", {"loss": 0.5}, 1)
    board.metrics("eval", {"click": {"ne": 0.5}}, 1)
    board.text("plan", "none")
    board.close()
    assert list(tmp_path.iterdir()) == []


def test_percentiles_do_not_ask_for_order():
    values = [float(v) for v in range(100, -1, -1)]
    assert percentiles(values) == {"p10": 10.0, "p50": 50.0, "p90": 90.0}
    assert percentiles([]) == {}


def test_peak_host_memory_is_in_bytes():
    resident_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert 0.9 * resident_bytes < peak_memory_bytes(RANK.device)["host_bytes"] < 100 * resident_bytes
