"""The benchmark's arithmetic: rounds and their order, and figures from which TorchRec predicts what was measured."""

import argparse

import pytest
import torch
from rich.console import Console
from torchrec.distributed.planner.types import BasicCommsBandwidths, CollectiveType

from dlrm_scale.cluster import bytes_per_ms
from dlrm_scale.errors import ConfigError
from tools.benchmark import cluster as command
from tools.benchmark.bandwidth import Samples, Thing
from tools.benchmark.cluster import fit
from tools.benchmark.timing import LEAST_ROUNDS, Case, spread, time_interleaved

MB = 1_000_000
KINDS = {
    "all-to-all": CollectiveType.ALL_TO_ALL,
    "reduce-scatter": CollectiveType.REDUCE_SCATTER,
    "all-gather": CollectiveType.ALL_GATHER,
    "all-reduce": CollectiveType.ALL_REDUCE,
}


def measured(ms_by_size: dict[int, float], *sizes: int) -> list[Samples]:
    """Collectives of these rank counts, `ms_by_size` (MB -> ms) x ranks each, in three rounds around that median."""
    samples = [Samples(Thing("host lookup, 512 B rows", 1, 100 * MB), [0.02, 0.025, 0.05])]
    for of in sizes:
        for name in KINDS:
            for size, ms in ms_by_size.items():
                seconds = ms * of / 1000
                samples.append(Samples(Thing(name, of, size * MB), [0.9 * seconds, seconds, 9 * seconds]))
    return samples


@pytest.mark.parametrize(("num_ranks", "ranks_per_host"), [(2, 2), (4, 4), (4, 2), (4, 1)])
def test_torchrec_predicts_the_median_time_of_a_large_message(num_ranks, ranks_per_host):
    samples = measured({1: 50.0, 16: 8.0, 64: 32.0}, *sorted({num_ranks, ranks_per_host}))
    cluster = fit(samples, "cpu", num_ranks, ranks_per_host, "the command")
    bandwidths = BasicCommsBandwidths(
        inter_host_bw=bytes_per_ms(cluster.inter_host_gb_per_s), intra_host_bw=bytes_per_ms(cluster.intra_host_gb_per_s)
    )
    pretended = num_ranks > ranks_per_host
    for name, kind in KINDS.items():
        if pretended and name == "all-reduce":
            continue  # then its bandwidth is a multiple of the exchanges'; only one of the two can be right
        predicted_ms = 64 * MB / bandwidths.get_bw(ranks_per_host, num_ranks, kind)
        assert predicted_ms == pytest.approx(32.0 * num_ranks, rel=0.01), name
    if pretended:
        predicted_ms = 64 * MB / bandwidths.get_bw(ranks_per_host, ranks_per_host, CollectiveType.REDUCE_SCATTER)
        assert predicted_ms == pytest.approx(32.0 * ranks_per_host, rel=0.01)
    assert cluster.host_memory_gb_per_s.value == pytest.approx(100 * MB / 0.025 / 1e9)


def test_pretended_hosts_share_the_machines_memory_and_their_figures_say_so():
    samples = measured({16: 8.0}, 2, 4)
    one, two = (fit(samples, "cpu", 4, ranks_per_host, "the command") for ranks_per_host in (4, 2))
    assert two.host_memory_gb.value == pytest.approx(one.host_memory_gb.value / 2)
    assert "pretended" in two.inter_host_gb_per_s.source and "no second host" in one.inter_host_gb_per_s.source


def test_a_source_gives_command_sizes_median_and_spread():
    source = fit(measured({16: 8.0, 64: 32.0}, 2), "cpu", 2, 2, "the command").intra_host_gb_per_s.source
    assert source.startswith("measured: the command: 3 rounds: ")
    # 16 MB in 16 ms and 64 MB in 64 ms are 1 GB/s; the slowest round takes nine times that, the fastest 0.9
    assert "reduce-scatter of 16 and 64 MB 1 GB/s (p10..p90 0.111..1.11)" in source


def test_cases_take_turns_and_the_first_round_does_not_count():
    calls = []
    cases = {name: Case(lambda name=name: calls.append(name)) for name in "ab"}
    verdicts = iter([True, True, False])
    samples = time_interleaved(cases, seconds=0.0, agree=lambda own: next(verdicts))
    assert {name: len(times) for name, times in samples.items()} == {"a": LEAST_ROUNDS + 2, "b": LEAST_ROUNDS + 2}
    assert calls == ["a", "b"] * (LEAST_ROUNDS + 3)


def test_a_short_call_is_timed_several_times_over_and_what_is_under_way_is_waited_for():
    events = []
    case = Case(lambda: events.append("call"), calls_per_sample=3, finish=lambda: events.append("finish"))
    time_interleaved({"a": case}, seconds=0.0, align=lambda: events.append("align"))
    assert events == ["align", "call", "call", "call", "finish"] * (LEAST_ROUNDS + 1)


def test_spread_is_of_the_samples():
    found = spread([float(x) for x in range(1, 12)])
    assert (found.p10, found.median, found.p90) == (2.0, 6.0, 10.0)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--nproc 4 --ranks-per-host 3", "does not divide --nproc 4, but hosts are equal; take one of 1, 2, 4"),
        ("--nproc 100000", "--nproc is 100000, and each rank takes .* GB are available; take at most"),
        ("--out no_such_folder/mine.yaml", "cannot write into the folder no_such_folder; make it, or name"),
        ("--out mine.json", "mine.json, but a cluster file's name ends in .yaml; take mine.yaml"),
        ("--out there.yaml", "there.yaml is there already and is not replaced; remove it, or name another"),
    ],
)
def test_what_cannot_be_measured_is_said_before_any_rank_starts(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine\n")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ConfigError, match=said):
        command.run(parser.parse_args(["--device", "cpu", *args.split()]), Console())
    assert (tmp_path / "there.yaml").read_text() == "mine\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_cuda_without_a_gpu_is_refused():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ConfigError, match="no GPU is usable here"):
        command.run(parser.parse_args(["--device", "cuda"]), Console())


@pytest.mark.parametrize("args", ["--nproc 0", "--nproc 1.5", "--ranks-per-host -2", "--seconds 0", "--seconds nan"])
def test_a_number_that_is_none_is_a_usage_error(args, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit) as e:
        parser.parse_args(args.split())
    assert e.value.code == 2 and f", but is {args.split()[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(("num_ranks", "ranks_per_host"), [(2, 2), (4, 2)])
def test_each_collective_s_coefficient_makes_up_for_the_common_figure(num_ranks, ranks_per_host):
    """All-to-all at twice the others' speed: the figure lies between, the coefficients say on which side."""
    samples = [
        Samples(s.thing, [t / 2 if s.thing.name == "all-to-all" else t for t in s.seconds])
        for s in measured({16: 8.0, 64: 32.0}, *sorted({num_ranks, ranks_per_host}))
    ]
    found = fit(samples, "cpu", num_ranks, ranks_per_host, "the command")
    weights = found.cost_coefficients
    assert weights.all_to_all == pytest.approx(weights.reduce_scatter / 2, rel=0.01)
    assert weights.reduce_scatter == weights.all_gather > 1 > weights.all_to_all
    for name, factor in (("all-to-all", weights.all_to_all), ("reduce-scatter", weights.reduce_scatter)):
        of_all = [s for s in samples if s.thing.name == name and s.thing.of == num_ranks]
        figure = found.intra_host_gb_per_s if num_ranks == ranks_per_host else found.inter_host_gb_per_s
        for s in of_all:
            assert factor * s.thing.num_bytes / bytes_per_ms(figure) == pytest.approx(1e3 * s.seconds[1], rel=0.01)
    if num_ranks == ranks_per_host:
        assert weights.all_reduce == pytest.approx(1, rel=0.01)
