"""The same code on one GPU with NCCL: parity with the plain twin, and the main job with what only CUDA has."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from dlrm_scale.cluster import load_cluster
from dlrm_scale.data.open import open_source
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.resilience.guards import fused_kernels
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.training.clock import STAGES
from dlrm_scale.training.ranks import this_rank
from dlrm_scale.training.readers import TrainReader
from tests.distributed.test_communication import changed
from tests.distributed.test_guards import bad_batch
from tests.support.launch import launch
from tests.support.twin import BAG_TYPES, case_config, compare, global_batches, make_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# CUDA sums with atomics and other tilings than the twin; three steps of float32 stay within this
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def one_rank():
    os.environ.update(LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0")
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("index_dedup", [False, True])
@pytest.mark.parametrize("bag_type", BAG_TYPES)
def test_sharded_equals_the_twin(one_rank, bag_type, index_dedup):
    config = case_config(bag_type, "row_wise", {"name": "rowwise_adagrad", "lr": 0.1})
    config = changed(config, train={"index_dedup": index_dedup})
    worst = compare(config, make_plan(config, 1, 1, "cuda"))
    assert worst.pop("moved") > 1e-3
    assert not {name: diff for name, diff in worst.items() if not diff <= TOLERANCE}


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=bf16", "train.accumulate_steps=2"],
        ["train.sparse={name: adam, lr: 0.01}", "train.pipeline=none"],
        [
            "train.sparse={name: rowwise_adagrad, weight_decay: 0.001}",
            "sharding.tables={user: {types: [data_parallel]}}",
        ],
    ],
    ids=["bf16", "adam", "decay"],
)
def test_the_main_job_trains(tmp_path, overrides):
    outcome = launch(tmp_path, "device=cuda", "train.max_steps=60", *overrides, nproc=1)
    assert outcome.code == 0, outcome.errors
    record = outcome.records[0]
    assert record["cluster"]["device"] == "cuda" and record["peak_memory"][0]["gpu_bytes"] > 0
    assert record["losses"][-1] < record["losses"][0]
    stages = record["stage_ms"]
    assert all(stages[s]["p50"] > 0 for s in STAGES if s not in ("data_wait", "input_dist"))


def test_the_cluster_benchmark_measures_the_gpu(tmp_path):
    out = tmp_path / "mine.yaml"
    command = [sys.executable, "-m", "tools.benchmark", "cluster", "--device", "cuda", "--nproc", "1", "--seconds", "2"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    cluster = load_cluster(str(out))
    assert cluster.hbm_gb_per_s.value > cluster.host_memory_gb_per_s.value
    assert cluster.hbm_gb_per_s.value > cluster.host_link_gb_per_s.value > 1


@pytest.mark.parametrize("name", ["adam", "partial_rowwise_adam", "lamb"])
def test_a_dropped_batch_leaves_tables_that_count_their_steps_as_they_were(one_rank, name):
    """FBGEMM counts these optimizers' steps in the forward pass, before it is known that the batch is bad."""
    config = case_config("row_wise", "table_wise", {"name": name, "lr": 0.01})
    result = bad_batch(config, make_plan(config, 1, 1, "cuda"), "sparse_dist", "nan", "without")
    assert result["changed"] == [] and len(result["found"]) == 1


def test_batches_are_read_into_page_locked_memory(one_rank):
    config = case_config("row_wise", "table_wise", {"name": "adam", "lr": 0.01})
    reader = TrainReader(config, this_rank("cuda"), open_source(config.data, config.features, "train", config.seed))
    with reader.batches() as stream:
        batch = next(stream)
    assert batch.dense_BF.is_pinned() and batch.bags.values().is_pinned() and batch.labels_BT.is_pinned()


@pytest.mark.parametrize("stochastic", [False, True])
def test_small_steps_of_fp16_tables_are_kept_on_average_by_stochastic_rounding_alone(one_rank, stochastic):
    """SGD steps of a tenth of half the distance between two weights, through the sharded model."""
    sparse = {"name": "sgd", "lr": 2e-5, "stochastic_rounding": stochastic}
    config = case_config("table_wise", "table_wise", sparse, data_type="fp16")
    device = torch.device("cuda:0")
    model = shard_model(build_model(config, dense_device=device), make_plan(config, 1, 1, "cuda"), config, device)
    [kernel] = fused_kernels(model.module.embeddings.ebc)
    for weights in kernel.split_embedding_weights():
        weights.fill_(1.0)
    batch = global_batches(config, 1, 0)[0].to(device)
    for _ in range(40):
        pooled = model.module.embeddings(batch.bags, batch.sequences)[0]
        pooled.wait()["user"].sum().backward()
    user = kernel.split_embedding_weights()[0].float()
    touched = batch.bags["user"].values().bincount(minlength=len(user))
    moved = (1 - user).mean(1)[touched > 0].double()
    if stochastic:
        assert float((moved / touched[touched > 0]).mean()) == pytest.approx(40 * 2e-5, rel=0.05)
    else:
        assert float(moved[touched[touched > 0] == 1].abs().max()) == 0
