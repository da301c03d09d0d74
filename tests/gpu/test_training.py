"""Training on one GPU with what only CUDA has: cached tables filled ahead, TF32, our kernel; and the benchmarks' configurations."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.support.launch import ROOT, launch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CACHED = "sharding.tables={user: {types: [table_wise], kernels: [fused_uvm_caching], cache_load_factors: [0.2]}}"
ON_GPU = ("device=cuda", "train.max_steps=40", "log.every_steps=5")
BENCHMARKS = sorted((ROOT / "configs" / "benchmark").glob("*.yaml"))


def test_prefetching_learns_what_the_other_pipeline_does(tmp_path):
    """Of 500 rows 100 are cached, so that batches of 64 put each other's rows out."""
    runs = [
        launch(tmp_path / name, *ON_GPU, CACHED, f"train.pipeline={name}", nproc=1)
        for name in ("sparse_dist", "prefetch")
    ]
    assert [run.code for run in runs] == [0, 0], runs[-1].errors
    assert "Invalid setting" not in runs[1].errors  # TorchRec's word on tables that do not lock their rows
    plain, prefetched = (run.records[0] for run in runs)
    assert prefetched["losses"] == pytest.approx(plain["losses"], abs=1e-4)
    assert prefetched["metrics"]["click"]["ne"] == pytest.approx(plain["metrics"]["click"]["ne"], abs=1e-4)


def test_prefetching_without_a_cache_is_refused(tmp_path):
    outcome = launch(tmp_path, *ON_GPU, "train.pipeline=prefetch", "sharding.tables={}", nproc=1)
    assert outcome.code == 2 and "no cache to fill" in outcome.errors


@pytest.mark.parametrize(
    "settings",
    [("train.tf32=true",), ("train.precision=bf16",), ("train.precision=bf16", "train.compile=true")],
    ids=["tf32", "bf16", "bf16_compiled"],
)
def test_the_fused_pffn_learns_what_the_plain_one_does(tmp_path, settings):
    plain, fused = (
        launch(tmp_path / kernel, *ON_GPU, *settings, f"model.pffn_kernel={kernel}", nproc=1)
        for kernel in ("torch", "triton")
    )
    assert (plain.code, fused.code) == (0, 0), fused.errors
    assert "cannot be compiled" not in fused.errors
    assert fused.records[0]["losses"] == pytest.approx(plain.records[0]["losses"], abs=2e-2)
    assert fused.records[0]["losses"] != plain.records[0]["losses"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_configuration_trains(tmp_path: Path, path: Path, precision: str):
    tree = yaml.safe_load(path.read_text())
    kernel = ("model.pffn_kernel=auto",) if tree["model"]["arch"] == "interformer" else ()
    cut = ("device=cuda", "train.max_steps=2", "log.every_steps=1", "log.warmup_steps=0", "eval.max_samples=4096")
    outcome = launch(tmp_path, *cut, f"train.precision={precision}", *kernel, nproc=1, tree=tree)
    assert outcome.code == 0, outcome.errors
    record = outcome.records[0]
    assert len(record["losses"]) == 2 and all(0.3 < loss < 1.5 for loss in record["losses"])
