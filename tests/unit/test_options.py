"""Which options a table has: what `all` adds to TorchRec's and leaves out, what constraints do, what is refused."""

import time

import numpy as np
import pytest
from pydantic import ValidationError

from dlrm_scale.cluster import CostCoefficients
from dlrm_scale.config import SEQUENCE_SHARDING_TYPES, TableSharding
from dlrm_scale.errors import ConfigError
from dlrm_scale.sharding.groups import SHARDING_TYPES
from dlrm_scale.sharding.options import STAGES, OptionSet, enumerate_options
from dlrm_scale.sharding.plan import PlanRequest, TableSpec
from tests.support.requests import CLUSTERS, cluster, random_request, request_of

ONE_HOST, TWO_HOSTS = cluster("cuda", 8, 8), cluster("cuda", 16, 8)


def spec(dim: int = 384, rows: int = 1_001, **fields: object) -> TableSpec:
    values = {"collection": "bags", "data_type": "fp32", "pooling": "sum", "expected_ids_by_feature": {"f": 2.0}}
    return TableSpec(num_embeddings=rows, embedding_dim=dim, **values | fields)


def request(machines=TWO_HOSTS, constraint: dict | None = None, optimizer: str = "rowwise_adagrad", **table: object):
    constraints = {"t": TableSharding(**constraint)} if constraint is not None else {}
    return request_of({"t": spec(**table)}, machines, constraints, sparse_optimizer=optimizer)


def cuts(options: OptionSet) -> dict[str, list[int]]:
    """Sharding type -> columns of a shard of each of its `fused` (data_parallel: `dense`) options."""
    first_group = np.searchsorted(options.group_option, np.arange(len(options.option_table)))
    found: dict[str, list[int]] = {}
    for option, group in enumerate(first_group):
        if options.option_kernel[option] in ("fused", "dense"):
            found.setdefault(str(options.option_type[option]), []).append(int(options.group_num_columns[group]))
    return found


def contents(options: OptionSet, option: int) -> tuple:
    """All that a search sees of an option, but its name."""
    mine = options.group_option == option
    arrays = (options.group_num_shards, options.group_num_rows, options.group_num_columns)
    wide = (options.group_ms, options.group_device_bytes, options.group_host_bytes)
    head = (int(options.option_table[option]), str(options.option_kernel[option]))
    factor = str(options.option_cache_load_factor[option])
    return (*head, factor, *(tuple(a[mine].tolist()) for a in arrays), *(a[mine].tobytes() for a in wide))


def num_shards(options, option):
    return int(options.group_num_shards[options.group_option == option].sum())


def has_an_empty_shard(options, option):
    return bool((options.group_num_rows[options.group_option == option] == 0).any())


@pytest.mark.parametrize(
    ("rows", "there"),
    [
        (1, {"data_parallel", "table_wise"}),
        (
            5,
            {"data_parallel", "table_wise", "table_row_wise"},
        ),  # 2, 2, 1 and none over 4 ranks; 3 and 2 over a host's 2
        (7, {"data_parallel", "table_wise", "table_row_wise", "row_wise"}),
    ],
)
def test_a_cut_that_leaves_a_rank_of_a_cpu_without_a_row_is_offered_only_where_no_other_type_is_allowed(rows, there):
    """FBGEMM's CPU kernels fail without one; on CUDA they do not."""
    machines = cluster("cpu", 4, 2)
    assert set(cuts(enumerate_options(request(machines, rows=rows, dim=32)))) - {"column_wise"} == there
    assert {"row_wise", "table_row_wise"} <= set(
        cuts(enumerate_options(request(cluster("cuda", 4, 2), rows=rows, dim=32)))
    )
    assert set(cuts(enumerate_options(request(machines, {"types": ("row_wise",)}, rows=rows, dim=32)))) == {"row_wise"}


def test_all_cuts_columns_at_torchrecs_width_and_at_every_half():
    found = cuts(enumerate_options(request(dim=384)))
    assert found == {
        "data_parallel": [384],
        "table_wise": [384],
        "column_wise": [192, 128, 96, 48],  # 128 is TorchRec's; 24 is less than 32
        "row_wise": [384],
        "table_row_wise": [384],
        "grid_shard": [192],  # three blocks of 128 would need three hosts
    }
    assert cuts(enumerate_options(request(dim=384), "stock")) == {
        "data_parallel": [384],
        "table_wise": [384],
        "column_wise": [128],
        "table_column_wise": [128],
        "row_wise": [384],
        "table_row_wise": [384],
    }


@pytest.mark.parametrize(
    ("dim", "min_partition", "widths"),
    [(512, None, [256, 128, 64, 32]), (64, 4, [32, 16, 8, 4]), (100, None, []), (60, 12, [12])],
)
def test_column_widths_are_multiples_of_four_that_divide_the_dim(dim, min_partition, widths):
    found = cuts(enumerate_options(request(dim=dim, constraint={"min_partition": min_partition})))
    assert found.get("column_wise", []) == widths


@pytest.mark.parametrize("machines", CLUSTERS.values(), ids=CLUSTERS)
def test_every_option_of_all_is_the_one_that_torchrec_has_at_that_min_partition(machines):
    asked = random_request(7, cluster(*machines), constrained=False)
    options = enumerate_options(asked)
    for name, table in asked.tables.items():
        mine = options.option_table == list(asked.tables).index(name)
        for o in np.flatnonzero(mine):
            width = int(options.group_num_columns[np.searchsorted(options.group_option, o)])
            kernel = str(options.option_kernel[o])
            factor = options.option_cache_load_factor[o]
            constraint = TableSharding(
                types=(str(options.option_type[o]),),
                kernels=None if kernel == "dense" else (kernel,),
                min_partition=width,
                cache_load_factors=(0.2,) if np.isnan(factor) else (float(factor),),
            )
            alone = request_of(
                {name: table}, asked.cluster, {name: constraint}, local_batch_size=asked.local_batch_size
            )
            stock = enumerate_options(alone, "stock")
            assert len(stock.option_table) == 1
            assert contents(stock, 0)[1:] == contents(options, o)[1:]


@pytest.mark.parametrize("machines", CLUSTERS.values(), ids=CLUSTERS)
def test_what_all_leaves_out_costs_and_holds_what_another_option_does(machines):
    for seed in range(20, 25):
        asked = random_request(seed, cluster(*machines), constrained=False)
        stock, every = enumerate_options(asked, "stock"), enumerate_options(asked)
        there = {contents(every, o) for o in range(len(every.option_table))}
        collections = [table.collection for table in asked.tables.values()]
        spread = [
            o
            for o in range(len(stock.option_table))
            if num_shards(stock, o) <= machines[1]
            and not (machines[0] == "cpu" and has_an_empty_shard(stock, o))
            and (collections[stock.option_table[o]], str(stock.option_type[o])) != ("sequences", "column_wise")
        ]
        assert spread and all(contents(stock, o) in there for o in spread)


def test_a_grid_that_is_asked_for_shares_hosts_where_there_are_too_few():
    assert cuts(enumerate_options(request(ONE_HOST, {"types": ("grid_shard",)}, dim=256))) == {"grid_shard": [128]}


def test_a_type_that_another_would_stand_for_is_kept_where_it_is_the_only_one():
    for only in ("column_wise", "table_column_wise"):
        assert cuts(enumerate_options(request(dim=16, constraint={"types": (only,)}))) == {only: [16]}
    within_hosts = {"types": ("table_wise", "table_column_wise")}
    found = cuts(enumerate_options(request(constraint=within_hosts)))
    assert found == {"table_wise": [384], "table_column_wise": [192, 128, 96, 48]}
    alone = {"types": ("table_row_wise",)}
    assert cuts(enumerate_options(request(ONE_HOST, alone))) == {"table_row_wise": [384]}
    assert "table_row_wise" not in cuts(enumerate_options(request(ONE_HOST)))
    assert cuts(enumerate_options(request(constraint={"types": ("grid_shard",)}, dim=64))) == {"grid_shard": [64]}


def test_grid_shard_is_free_for_sums_on_two_hosts_only():
    assert "grid_shard" in cuts(enumerate_options(request()))
    assert "grid_shard" not in cuts(enumerate_options(request(ONE_HOST)))
    assert "grid_shard" not in cuts(enumerate_options(request(pooling="mean")))


def test_grid_shards_come_by_column_block_with_whole_last_and_empty_rows():
    constraint = {"types": ("grid_shard",), "kernels": ("fused",)}
    options = enumerate_options(request(cluster("cuda", 8, 4), constraint, dim=256, rows=5))
    assert options.group_num_shards.tolist() == [2, 1, 1] * 2  # rows of a host's 4 ranks: 2, 2, 1, 0
    assert options.group_num_rows.tolist() == [2, 1, 0] * 2
    assert options.group_num_columns.tolist() == [128] * 6


def test_tables_that_differ_only_in_pooling_have_their_own_options():
    tables = {"sum": spec(), "mean": spec(pooling="mean")}
    options = enumerate_options(request_of(tables, TWO_HOSTS))
    assert set(options.option_table[options.option_type == "grid_shard"]) == {0}


def test_a_sequences_table_has_the_types_and_the_one_column_width_of_its_collection():
    found = cuts(enumerate_options(request(collection="sequences")))
    assert found == {"table_wise": [384], "column_wise": [128], "row_wise": [384]}
    assert set(found) == set(SEQUENCE_SHARDING_TYPES)


def test_tables_are_replicated_only_where_the_optimizer_has_a_twin():
    assert set(cuts(enumerate_options(request(optimizer="adam"), "stock"))) == set(SHARDING_TYPES) - {
        "data_parallel",
        "grid_shard",
    }


@pytest.mark.parametrize(
    ("widths", "constraint", "factors"),
    [
        ("all", {}, [0.1, 0.2, 0.5]),
        ("stock", {}, [0.2]),
        ("all", {"cache_load_factors": (0.3, 0.3, 1.0)}, [0.3, 1.0]),
        ("stock", {"cache_load_factors": (0.3,)}, [0.3]),
        ("all", {"kernels": ("fused_uvm", "fused")}, []),
    ],
)
def test_one_cached_option_for_each_cache_load_factor(widths, constraint, factors):
    options = enumerate_options(request(constraint={"types": ("table_wise",), **constraint}), widths)
    found = options.option_cache_load_factor[options.option_kernel == "fused_uvm_caching"]
    assert found.tolist() == factors
    assert np.isnan(options.option_cache_load_factor[options.option_kernel != "fused_uvm_caching"]).all()


def test_a_table_that_is_never_read_costs_nothing_but_its_bytes():
    options = enumerate_options(request(constraint={"types": ("table_wise",)}, expected_ids_by_feature={"f": 0.0}))
    assert not options.group_ms.any()
    assert (options.group_device_bytes + options.group_host_bytes).sum(1).min() >= 1_001 * 384 * 4


# ---------------------------------------------------------------- refusals
def with_two_sequence_widths() -> PlanRequest:
    tables = {"t": spec(collection="sequences"), "u": spec(collection="sequences")}
    return request_of(tables, TWO_HOSTS, {"u": TableSharding(min_partition=64)})


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (
            request(cluster("cpu", 2, 2), {"kernels": ("fused", "fused_uvm")}),
            ConfigError,
            "sharding.tables.t.kernels has fused_uvm, which cpu does not have; take fused, or leave it out",
        ),
        (
            request(constraint={"types": ("row_wise", "table_row_wise")}, collection="sequences"),
            ConfigError,
            "sharding.tables.t.types has table_row_wise, but a sequence reads t",
        ),
        (
            request(constraint={"types": ("data_parallel",)}, optimizer="adam"),
            ConfigError,
            "data_parallel, which can train by rowwise_adagrad, adagrad, sgd, but train.sparse.name is adam",
        ),
        (
            request(constraint={"types": ("grid_shard",)}, pooling="mean"),
            ConfigError,
            "grid_shard, which TorchRec 1.8.0 computes wrong for pooling: mean; leave it out, or set features.tables.t.pooling=sum",
        ),
        (
            request(constraint={"min_partition": 32}, dim=48),
            ConfigError,
            "sharding.tables.t.min_partition is 32, which does not divide embedding_dim 48 of table t; take one of 4, 8, 12, 16, 24, 48",
        ),
        (request(constraint={"min_partition": 64}, dim=32), ConfigError, "take one of 4, 8, 16, 32"),
        (
            request_of({"s": spec(), "t": spec(data_type="bf16")}, TWO_HOSTS),
            ConfigError,
            "table t has data_type bf16, which FBGEMM 1.8.0 does not have on CUDA",
        ),
        (
            with_two_sequence_widths(),
            ConfigError,
            "must all have one width, but those of u have 64 columns, those of t have 128 columns; give these tables one and",
        ),
    ],
    ids=[
        "kernel",
        "collection",
        "optimizer",
        "mean",
        "min_partition",
        "too wide",
        "bf16",
        "widths",
    ],
)
def test_what_cannot_be_is_refused_by_name(asked, error, said):
    with pytest.raises(error) as e:
        enumerate_options(asked)
    assert said in str(e.value), str(e.value)


@pytest.mark.parametrize("ids", [-1.0, float("nan"), float("inf")])
def test_expected_ids_are_numbers_that_may_be_zero(ids):
    with pytest.raises(ValidationError, match=r"expected_ids_by_feature\.f"):
        spec(expected_ids_by_feature={"f": ids})


# ---------------------------------------------------------------- size
def test_thousands_of_tables_on_hundreds_of_ranks_are_a_matter_of_moments():
    tables = {f"t{i}": spec(dim=512, rows=1_000 + i) for i in range(3_000)}
    asked = request_of(tables, cluster("cuda", 512, 8))
    started = time.perf_counter()
    options = enumerate_options(asked)
    assert time.perf_counter() - started < 2
    assert options.group_num_shards.sum() > 8_000_000
    assert sum(array.nbytes for array in vars(options).values() if isinstance(array, np.ndarray)) < 200e6


@pytest.mark.parametrize("machines", [TWO_HOSTS, ONE_HOST], ids=["two hosts", "one host"])
def test_a_collective_s_coefficient_weighs_its_time_and_no_other(machines):
    """By stage and sharding type: which collective carries it, on bags and on sequences."""
    carried = {
        "all_to_all": {("table_wise", "fwd_comms"), ("table_wise", "bwd_comms"), ("column_wise", "fwd_comms"),
                       ("column_wise", "bwd_comms")},
        "reduce_scatter": {("row_wise", "fwd_comms"), ("table_row_wise", "fwd_comms")},
        "all_gather": {("row_wise", "bwd_comms"), ("table_row_wise", "bwd_comms")},
        "all_reduce": {("data_parallel", "bwd_comms")},
    }  # fmt: skip
    if machines.num_hosts > 1:  # rows of a host meet those of others
        carried["all_to_all"] |= {("table_row_wise", "fwd_comms"), ("table_row_wise", "bwd_comms")}

    def by_type(collection: str, weights: CostCoefficients) -> dict[tuple[str, str], float]:
        on = machines.model_copy(update={"cost_coefficients": weights})
        options = enumerate_options(request(on, dim=384, collection=collection), "stock")
        kinds = options.option_type[options.group_option]
        return {
            (kind, stage): float(options.group_ms[kinds == kind][:, STAGES.index(stage)].sum())
            for kind in {k for k, _ in set().union(*carried.values())} & set(kinds)
            for stage in ("fwd_comms", "bwd_comms", "fwd_compute", "bwd_compute")
        }

    plain = by_type("bags", CostCoefficients())
    for name, expected in carried.items():
        slower = by_type("bags", CostCoefficients(**{name: 3.0}))
        assert {key for key in plain if slower[key] > plain[key] * (1 + 1e-9)} == expected, name
        assert all(slower[key] == plain[key] for key in plain if key not in expected), name
    events = [
        by_type("sequences", CostCoefficients(**weights))
        for weights in ({}, {"reduce_scatter": 3.0}, {"all_to_all": 3.0})
    ]
    assert events[0] == events[1], "events are not summed: their rows go back by all-to-all"
    assert events[2]["row_wise", "fwd_comms"] == pytest.approx(3 * events[0]["row_wise", "fwd_comms"])
