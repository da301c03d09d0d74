"""The training benchmark's arithmetic: what it counts, which variants it makes, and how it compares them."""

import argparse
import json
import subprocess
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
import yaml

from dlrm_scale.config_io import parse_config
from dlrm_scale.errors import ConfigError
from dlrm_scale.training.ranks import Rank
from dlrm_scale.training.readers import TrainReader
from tests.support.configs import TINY, tiny_config
from tests.support.model_inputs import random_batch, run_config
from tools.benchmark import train, train_ranks
from tools.benchmark.peaks import Peaks
from tools.benchmark.ranks import TRAIN_SILENCE_SECONDS
from tools.benchmark.roofline import as_read, count_work, embedding_bytes
from tools.benchmark.train import BASE, check_stock, figures, other_commit, summary, variants_of
from tools.benchmark.train_ranks import CountingReader, RankRun

PLAIN = {
    "features": {
        "tables": {name: {"num_embeddings": 100, "embedding_dim": 8} for name in ("user", "item")},
        "dense": [{"name": "age"}],
        "categorical": [{"name": name, "table": name} for name in ("user", "item")],
        "sequences": [],
        "group": None,
    },
    "model": {"arch": "dlrm", "bottom_hidden": [8], "top_hidden": [16]},
}


def plain_config(**train):
    return parse_config({**TINY, **PLAIN, "train": {**TINY["train"], **train}}, "tests")


def test_bytes_of_pooled_tables_by_hand():
    """A sample of two features of one id, 8 columns of 4 bytes: forward id 8, row 32, pooled row 32; backward gradient 32, row and
    state read and written."""
    assert embedding_bytes(plain_config()) == 64 * 2 * ((8 + 32 + 32) + (32 + 2 * (32 + 4)))
    assert embedding_bytes(plain_config(sparse={"name": "adagrad"})) == 64 * 2 * (104 + 2 * (32 + 32))
    assert embedding_bytes(plain_config(sparse={"name": "sgd"})) == 64 * 2 * (104 + 2 * 32)


def test_padding_is_no_work():
    """What counts is how long sequences are on average, not how long they may be."""
    [history] = TINY["features"]["sequences"]

    def flops(**lengths):
        sequences = [{**history, **lengths}]
        return count_work(
            parse_config({**TINY, "features": {**TINY["features"], "sequences": sequences}}, "tests"), 1
        ).dense_flops

    assert flops(max_length=40, pooling_factor=4.2) == flops(max_length=4) < flops(max_length=40)


def test_ids_are_counted_as_batches_are_read(monkeypatch):
    given = [random_batch(run_config().features, 16, seed) for seed in (1, 2)]
    monkeypatch.setattr(TrainReader, "batches", lambda reader, consumed: nullcontext(iter(given)))
    reader = object.__new__(CountingReader)
    with reader.batches() as read:
        assert list(map(id, read)) == list(map(id, given))
    ids = {key: 0 for ids in (given[0].bags, given[0].sequences) for key in ids.keys()}
    for batch in given:
        for jagged in (batch.bags, batch.sequences):
            for key in jagged.keys():
                ids[key] += int(jagged[key].lengths().sum()) / 32
    assert reader.ids_per_sample == ids


def test_work_is_of_the_ids_that_were_read(tmp_path):
    """What the configuration expects of the data need not be so."""
    base = variants_of(arguments(tmp_path))[0]
    names = {"tags": 4.0, "user": 0.0, "history_item": 2.0, "history_category": 2.0}
    ranks = [
        RankRun(100.0, [1.0], {}, {}, Peaks({"fp32": 1e9}, 1e9), {name: ids + more for name, ids in names.items()})
        for more in (0.0, 1.0)
    ]
    found = figures(base, ranks)
    assert found["ids_per_sample"] == {name: ids + 0.5 for name, ids in names.items()}
    tree = base.config.model_dump(mode="json")
    tree["features"]["sequences"][0]["pooling_factor"] = 2.5
    for feature in tree["features"]["categorical"]:
        feature["pooling_factor"] = {"tags": 4.5, "user": 0.5}.get(feature["name"], 1.0)
    assert found["work"] == asdict(count_work(parse_config(tree, "tests"), 2)) != asdict(count_work(base.config, 2))
    assert found["mfu"]["fp32"] == pytest.approx(100.0 / 64 * found["work"]["dense_flops"] / 1e9)
    assert as_read(base.config, {}) == base.config and as_read(base.config, {"history_item": 0.0}) != base.config


def test_bytes_of_sequences_and_bags_grow_with_their_ids():
    few = TINY["features"]
    many = {
        **few,
        "categorical": [{**f, "pooling_factor": 5.0} if f["name"] == "tags" else f for f in few["categorical"]],
    }
    more = embedding_bytes(tiny_config(features=many)) - embedding_bytes(tiny_config())
    assert more == 64 * 2 * ((8 + 32) + 2 * (32 + 4))  # two more ids a sample, pooled into the same row


def test_flops_are_those_of_the_global_batch_however_it_is_cut():
    one = count_work(plain_config(), 1)
    assert one == count_work(plain_config(), 2) == count_work(plain_config(accumulate_steps=2), 2)
    assert count_work(plain_config(global_batch_size=128), 2).dense_flops == 2 * one.dense_flops


def arguments(tmp_path, *changes, tree=TINY, **options):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    defaults = {"variant": [], "skip": [], "stock": [], "nproc": 2, "threads": 1, "steps": 8}
    return argparse.Namespace(config=str(path), changes=list(changes), **{**defaults, **options})


def test_variants_differ_from_the_base_in_what_they_name(tmp_path):
    variants = variants_of(
        arguments(
            tmp_path,
            "train.global_batch_size=128",
            variant=[["plain", "train.pipeline=none"], ["alone", "launch.num_ranks=1", "launch.threads_per_rank=2"]],
            skip=["data"],
        )
    )
    base, plain, _, without = variants
    assert [v.name for v in variants] == [BASE, "plain", "alone", "without data"]
    assert {v.config.train.global_batch_size for v in variants} == {128}
    assert (base.config.train.pipeline, plain.config.train.pipeline) == ("sparse_dist", "none")
    assert [(v.ranks, v.threads) for v in variants] == [(2, 1), (2, 1), (1, 2), (2, 1)]
    assert (without.skip, without.config) == ("data", base.config)
    assert base.config.train.max_steps == 8 and base.config.log.warmup_steps == 2


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (["a", "train.pipelin=none"], "pipeline"),
        (["a", "launch.num_ranks=two"], "whole number"),
        (["a", "launch.num_ranks=²"], "whole number"),
        (["a", "launch.num_ranks=3"], "data.lanes"),
        ([BASE], "two variants of the name 'base'"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(tmp_path, variant, message):
    with pytest.raises(ConfigError, match=message):
        variants_of(arguments(tmp_path, variant=[variant]))


def test_stock_is_refused_for_what_torchrec_has_no_model_of(tmp_path):
    with pytest.raises(ConfigError, match=r"it needs model\.arch dlrm or dlrm_dcnv2"):
        variants_of(arguments(tmp_path, stock=[[]]))
    check_stock(plain_config())
    more = (
        {"sparse": {"name": "sgd"}},
        {"accumulate_steps": 2},
        {"clip_grad_norm": 1.0},
        {"schedule": {"warmup_steps": 1}},
    )
    for changes in more:  # a plain loop would leave them out, and look faster
        with pytest.raises(ConfigError, match="in a plain loop"):
            check_stock(plain_config(**changes))


def test_stock_is_launched_as_asked(tmp_path, monkeypatch):
    calls = []

    def run_on_ranks(work, arguments, num_ranks, ranks_per_host, told, *, plain_allocator, silence_seconds):
        calls.append((num_ranks, arguments[1], plain_allocator, silence_seconds))
        raise InterruptedError

    monkeypatch.setattr(train, "run_on_ranks", run_on_ranks)
    one = ["launch.num_ranks=1", "launch.threads_per_rank=2"]
    stock = [[], one, [*one, "launch.allocator=ours"]]
    _, *found = variants_of(arguments(tmp_path, tree={**TINY, **PLAIN}, stock=stock))
    for variant in found:
        with pytest.raises(InterruptedError):
            variant.measure(variant, print)
    seconds = TRAIN_SILENCE_SECONDS
    assert dict(zip((v.name for v in found), calls, strict=True)) == {
        "stock TorchRec": (2, 1, True, seconds),
        "stock TorchRec, 1 rank of 2 threads": (1, 2, True, seconds),
        "stock TorchRec, 1 rank of 2 threads, our allocator": (1, 2, False, seconds),
    }
    for change in ("train.precision=bf16", "launch.allocator=mine"):
        with pytest.raises(ConfigError, match=f"takes launch.num_ranks=N.*but not '{change}'"):
            variants_of(arguments(tmp_path, tree={**TINY, **PLAIN}, stock=[[change]]))


def test_another_commit_trains_the_base_with_its_own_code_and_leaves_no_worktree(tmp_path, monkeypatch):
    ran, answers = [], {"stdout": json.dumps({"variants": {BASE: {"runs": [{"samples_per_s": 7.0}]}}}), "returncode": 0}

    def run(command, **options):
        ran.append((command, options.get("env", {}).get("PYTHONPATH")))
        return subprocess.CompletedProcess(command, **{"stderr": "no such key", **answers})

    monkeypatch.setattr(train.subprocess, "run", run)
    with train.other_commit(arguments(tmp_path, "train.global_batch_size=128", commit="v1")) as variant:
        assert variant.name == "at v1" and variant.measure(variant, lambda told: None) == {"samples_per_s": 7.0}
        answers["returncode"] = 2
        with pytest.raises(ConfigError, match="does not run at v1: no such key"):
            variant.measure(variant, lambda told: None)
        answers["returncode"] = 0
    _, (added, _), (trained, path), _, (removed, _) = ran
    assert added == ["git", "worktree", "add", "--detach", path, "v1"] and removed[-1] == path
    assert removed[:4] == ["git", "worktree", "remove", "--force"]
    assert "train.global_batch_size=128" in trained and trained[trained.index("--steps") + 1] == "8"


def test_what_the_device_lacks_is_refused_as_the_trainer_refuses_it():
    rank = Rank(0, 1, 0, 1, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"train\.tf32 is true, but only CUDA"):
        train_ranks.plan_of(tiny_config(train={"tf32": True}), rank)


def test_ratios_are_of_the_runs_of_one_repeat():
    """A machine that slows down twofold in the second repeat changes no ratio."""
    base = [{"samples_per_s": s} for s in (100.0, 50.0, 100.0)]
    twice = [{"samples_per_s": s} for s in (200.0, 100.0, 220.0)]
    found = summary(twice, base)
    assert found["over_base"] == {"median": 2.0, "least": 2.0, "most": 2.2}
    assert found["samples_per_s"] == {"median": 200.0, "least": 100.0, "most": 220.0}


def test_a_commit_that_is_none_is_told_before_anything_is_measured(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"no such commit; git log"),
        other_commit(arguments(tmp_path, commit="nonsense")),
    ):
        pass
