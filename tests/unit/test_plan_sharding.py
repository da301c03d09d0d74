"""The planner's command line, in this process: what it finds, tells, writes and refuses."""

import copy
import json
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from dlrm_scale.cluster import load_cluster
from dlrm_scale.config_io import parse_config
from dlrm_scale.sharding.plan import Plan, save_plan
from tests.support.configs import TINY
from tools.plan_sharding.cli import main
from tools.plan_sharding.jobs import config_job

ROOT = Path(__file__).parents[2]
HEAD = "name,num_embeddings,embedding_dim,pooling_factor,num_features,collection,data_type,pooling\n"
TABLES = "user,20000000,128,1,1,bags,fp16,sum\nitem,5000000,64,20,2,bags,fp32,sum\ntag,1000,32,8,1,bags,fp32,mean\nclick,1000000,64,50,1,sequences,fp32,sum\n"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs/clusters is looked up in the working directory
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """tables.csv, config.yaml, and plan.json of the tables on 8xh100."""
    folder = tmp_path_factory.mktemp("plans")
    (folder / "tables.csv").write_text(HEAD + TABLES)
    (folder / "config.yaml").write_text(yaml.safe_dump(TINY))
    arguments = [*of_tables(folder), "--cluster", str(ROOT / "configs/clusters/8xh100.yaml")]
    assert main([*arguments, "--out", str(folder / "plan.json")]) == 0
    return folder


def of_tables(folder: Path, name: str = "tables.csv", batch: int = 512) -> list[str]:
    return ["--tables", str(folder / name), "--local-batch-size", str(batch), "sharding.search_seconds=0.2"]


def result_of(capsys, *arguments: str, code: int = 0) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def plan_in(file: Path) -> Plan:
    tree = json.loads(file.read_text())
    del tree["digest"]
    return Plan.model_validate_json(json.dumps(tree))


def test_the_plan_that_is_told_is_the_one_that_is_written(folder, capsys):
    result = result_of(capsys, *of_tables(folder), "--cluster", "8xh100", "--plan", str(folder / "plan.json"))
    plan = plan_in(folder / "plan.json")
    assert result["fingerprint"] == plan.fingerprint and result["made_for"] == []
    assert 0 < result["bound_ms"] <= result["score_ms"] == plan.score_ms
    assert set(result["sharding_types"]) == {"user", "item", "tag", "click"} and len(result["ranks"]) == 8
    fullest = result["fullest_rank"]
    sums = [sum(rank["device_bytes"].values()) for rank in result["ranks"]]
    assert fullest["device_bytes"] == pytest.approx(max(sums)) == pytest.approx(sums[fullest["rank"]])


def test_what_is_printed_fits_80_columns_and_ends_with_what_to_do(folder, capsys):
    arguments = [*of_tables(folder), "--cluster", "8xh100", "--explain", "item", "--dry-run-rank", "fullest"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 80 and said.err == ""
    assert lines[-1].startswith("next: ") and "--out FILE" in lines[-1]
    assert any("no plan can be under" in line for line in lines)


@pytest.mark.parametrize(("cluster", "hosts"), [("8xh100", []), ("128xh200", ["--nnodes", "16", "--node-rank", "N"])])
def test_the_next_command_trains_on_the_plan_as_it_was_asked(folder, tmp_path, capsys, cluster, hosts):
    overrides = ["data.lanes=128", "train.global_batch_size=128", "sharding.apart=[[user, item]]"]
    config, out = str(folder / "config.yaml"), str(tmp_path / "plan.json")
    arguments = ["--config", config, "--cluster", cluster, "--time-limit", "0.2", "--out", out, *overrides]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    command = said[said.index("\nnext") :].split(":", 1)[1]
    words = [word for word in shlex.split(command) if word != "\n"]
    assert words[: 1 + len(hosts)] == ["launchers/torchrun.sh", *hosts]
    assert words[words.index("--nproc") :] == ["--nproc", "8", "--config", config, *overrides, f"sharding.plan={out}"]


def test_tables_alone_start_without_torch(folder):
    arguments = [*of_tables(folder), "--cluster", "2xcpu", "--time-limit", "0.1", "--json"]
    script = f"import sys; from tools.plan_sharding.cli import main; assert main({arguments!r}) in (0, 1); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "False", done.stderr


# ---------------------------------------------------------------- explain, compare, plan
def test_explain_holds_the_plan_and_what_else_there_was(folder, capsys):
    arguments = [*of_tables(folder), "--cluster", "8xh100", "--plan", str(folder / "plan.json"), "--explain", "item"]
    result = result_of(capsys, *arguments)
    costs = result["explain"]
    chosen = [cost for cost in costs if cost["is_chosen"]]
    assert [cost["sharding_type"] for cost in chosen] == [result["sharding_types"]["item"]]
    assert chosen[0]["score_ms"] == pytest.approx(result["score_ms"])
    assert {"row_wise", "column_wise", "table_wise"} <= {cost["sharding_type"] for cost in costs}
    fitting = [cost["score_ms"] for cost in costs if cost["fits"]]
    assert fitting == sorted(fitting)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "table item: each way to shard it" in said and "because the next best" in said


def test_compare_names_what_moved_and_that_the_batch_was_another(folder, capsys):
    earlier = json.loads((folder / "plan.json").read_text())["tables"]["tag"]["sharding_type"]
    other = "row_wise" if earlier != "row_wise" else "table_wise"
    arguments = [*of_tables(folder, batch=1024), "--cluster", "8xh100", f"sharding.tables.tag.types=[{other}]"]
    arguments += ["--compare", str(folder / "plan.json")]
    result = result_of(capsys, *arguments)
    change = next(change for change in result["compare"]["changes"] if change["table"] == "tag")
    assert change["before"].startswith(earlier) and change["after"].startswith(other)
    assert result["compare"]["made_for"] == [
        "local_batch_size is 512 there, 1024 here",
        f"sharding.tables.tag.types is None there, ('{other}',) here",
    ]
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "was made for another request" in said and "local_batch_size is 512 there, 1024 here" in said


def test_the_same_seed_gives_the_same_plan_and_nothing_to_compare(tmp_path, capsys):
    (tmp_path / "two.csv").write_text(HEAD + "a,1000,32,1,,,,\nb,50000,32,4,,,,\n")
    arguments = ["--tables", str(tmp_path / "two.csv"), "--local-batch-size", "64", "--cluster", "2xcpu", "--seed", "3"]
    assert main([*arguments, "--out", str(tmp_path / "plan.json")]) == 0
    assert result_of(capsys, *arguments, "--compare", str(tmp_path / "plan.json"))["compare"]["changes"] == []


# ---------------------------------------------------------------- sweep
def test_a_sweep_tells_where_memory_begins_to_be_enough(tmp_path, capsys):
    (tmp_path / "big.csv").write_text(HEAD + "".join(f"t{i},20000000,128,1,,,fp16,\n" for i in range(12)))  # 61 GB
    arguments = [*of_tables(tmp_path, "big.csv", 512), "--cluster", "2xcpu", "--sweep", "ranks=2,8,16"]
    rows = result_of(capsys, *arguments)
    assert [(row["num_ranks"], row["local_batch_size"]) for row in rows] == [(2, 512), (8, 128), (16, 64)]
    assert [row["fits"] for row in rows] == [False, True, True]
    assert "no sharding plan fits" in rows[0]["reason"]
    assert (
        rows[2]["fullest_device_bytes"] < rows[1]["fullest_device_bytes"] <= load_cluster("2xcpu").host_bytes_per_rank
    )
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "no plan" in said and said.splitlines()[-1].startswith("next: ")
    assert max(map(len, said.splitlines())) <= 80
    assert main([*of_tables(tmp_path, "big.csv", 512), "--cluster", "2xcpu", "--sweep", "ranks=1,2"]) == 1


def test_another_batch_or_cluster_counts_the_activations_anew():
    config = parse_config(TINY, "test")
    job = config_job(config, load_cluster("2xcpu"))
    grown = job.resize(load_cluster("4xcpu"), 64)
    assert (job.request.local_batch_size, grown.request.local_batch_size) == (32, 64)
    assert grown.config.train.global_batch_size == 256
    assert grown.request.dense_activation_bytes > 1.5 * job.request.dense_activation_bytes


# ---------------------------------------------------------------- html
class Page(HTMLParser):
    """Tags by count, bars by rank and chart, the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.charts: list[list[float]] = []
        self.cells: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag == "svg":
            self.charts.append([])
        elif tag == "g":
            self.charts[-1].append(0.0)
        elif tag == "rect":
            self.charts[-1][-1] += float(values["height"])
        elif tag == "td":
            self.cells.append("")
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_the_html_report_draws_each_rank_to_scale(folder, tmp_path, capsys):
    (tmp_path / "tables.csv").write_text(HEAD + TABLES.replace("user", "<b>&user"))
    arguments = [*of_tables(tmp_path), "--cluster", "8xh100", "--html", str(tmp_path / "report.html")]
    result = result_of(capsys, *arguments)
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == [] and page.links == []
    assert [len(bars) for bars in page.charts[:2]] == [8, 8]
    for bars, kind in zip(page.charts, ("step_ms", "device_bytes"), strict=False):
        sums = [sum(rank[kind].values()) for rank in result["ranks"]]
        scale = max(bars) / max(sums)
        assert bars == pytest.approx([value * scale for value in sums], abs=0.1)
    assert "<b>&user" in page.cells and "20,000,000" in page.cells
    assert result["sharding_types"]["tag"] in page.cells[page.cells.index("tag") :][:6]


# ---------------------------------------------------------------- what does not fit
def ways_of(capsys, *arguments: str) -> list[str]:
    result = result_of(capsys, *arguments, code=1)
    assert result["fits"] is False and "GB" in result["reason"]
    return result["ways_to_fit"]


def test_the_hosts_that_are_said_to_be_enough_are_and_no_fewer(tmp_path, capsys):
    (tmp_path / "big.csv").write_text(HEAD + "".join(f"t{i},20000000,128,1,,,fp16,\n" for i in range(12)))
    arguments = of_tables(tmp_path, "big.csv", 64)
    way = next(way for way in ways_of(capsys, *arguments, "--cluster", "2xcpu") if "hosts" in way)
    hosts = int(way.split()[0])
    tree = yaml.safe_load((ROOT / "configs/clusters/2xcpu.yaml").read_text())
    for count, code in ((hosts, 0), (hosts - 1, 1)):
        (tmp_path / "more.yaml").write_text(yaml.safe_dump({**tree, "num_ranks": 2 * count}))
        assert main([*arguments, "--cluster", str(tmp_path / "more.yaml")]) == code
    assert hosts > 1


def test_the_tables_that_are_to_be_fp16_are_enough_and_no_fewer(tmp_path, capsys):
    sizes = [9, 8, 7, 6, 5, 4]
    lines = [f"t{i},{size}000000,64,1,,,%s,\n" for i, size in enumerate(sizes)]
    (tmp_path / "cpu.csv").write_text(HEAD + "".join(line % "fp32" for line in lines))  # 10 GB
    tree = yaml.safe_load((ROOT / "configs/clusters/2xcpu.yaml").read_text())
    tree["host_memory_gb"] = {"value": 9.0, "source": "test"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    arguments = [*of_tables(tmp_path, "cpu.csv", 64), "--cluster", str(tmp_path / "small.yaml")]
    way = next(way for way in ways_of(capsys, *arguments) if "fp16" in way)
    count = int(way.split("largest ")[1].split()[0])
    assert 1 <= count < len(sizes) and "t0" in way
    for narrow, code in ((count, 0), (count - 1, 1)):
        types = ["fp16"] * narrow + ["fp32"] * (len(sizes) - narrow)
        (tmp_path / "cpu.csv").write_text(HEAD + "".join(line % kind for line, kind in zip(lines, types, strict=True)))
        assert main(arguments) == code


def test_the_tables_to_set_free_are_named(tmp_path, capsys):
    (tmp_path / "big.csv").write_text(HEAD + "huge,300000000,128,1,,,,\nsmall,1000,32,1,,,,\n")
    rules = [f"sharding.tables.{name}={{types: [table_wise], kernels: [fused]}}" for name in ("huge", "small")]
    arguments = [*of_tables(tmp_path, "big.csv", 64), "--cluster", "8xh100"]
    ways = ways_of(capsys, *arguments, *rules)
    assert any("any way to shard" in way and way.split(" for ")[1].startswith("table huge in") for way in ways), ways
    assert any("host memory" in way and "table huge in" in way for way in ways), ways
    assert main([*arguments, "sharding.tables.huge.kernels=[fused]", rules[1]]) == 0
    assert main([*arguments, "sharding.tables.huge.types=[table_wise]", rules[1]]) == 0


def test_what_no_memory_together_can_hold_is_proven(tmp_path, capsys):
    (tmp_path / "huge.csv").write_text(HEAD + "huge,20000000000,128,1,,,,\n")
    assert main([*of_tables(tmp_path, "huge.csv"), "--cluster", "8xh100"]) == 1
    said = capsys.readouterr().err
    assert "no sharding plan fits" in said and "table huge" in said and "host memory" in said and "would fit" in said
    (tmp_path / "many.csv").write_text(HEAD + "".join(f"t{i},360000000,128,1,,,,\n" for i in range(20)))
    assert main([*of_tables(tmp_path, "many.csv"), "--cluster", "8xh100"]) == 1
    said = capsys.readouterr().err
    assert "no sharding plan fits" in said and "device and host memory together" in said


# ---------------------------------------------------------------- dry run
def test_a_plan_whose_bytes_are_wrong_fails_its_dry_run(folder, tmp_path, capsys):
    plan = plan_in(folder / "plan.json")
    arguments = [*of_tables(folder), "--cluster", "8xh100", "--dry-run-rank", "0", "--plan"]
    assert result_of(capsys, *arguments, str(folder / "plan.json"))["dry_run"]["ok"]
    first = plan.ranks[0]
    less = first.model_copy(
        update={"device_bytes": first.device_bytes | {"weights": first.device_bytes["weights"] / 2}}
    )
    save_plan(plan.model_copy(update={"ranks": (less, *plan.ranks[1:])}), tmp_path / "wrong.json")
    assert main([*arguments, str(tmp_path / "wrong.json")]) == 1
    said = capsys.readouterr().out
    assert "WRONG" in said and "bytes of weights" in said


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["sharding.tables.nope.types=[row_wise]"], 2, ["sharding.tables names table nope", "user, item, tag, click"]),
        (["sharding.apart=[[user, nope]]"], 2, ["sharding.apart names table nope"]),
        (["sharding.tables.user.pin=[0]", "sharding.tables.tag.pin=[1]", "sharding.together=[[user, tag]]"], 2, ["sharding.together", "[0], [1]"]),
        (["sharding.tables.user={pin: [0], avoid_ranks: [0]}"], 2, ["pin puts a shard on rank [0]"]),
        (["sharding.tables.user={types: [data_parallel], kernels: [fused_uvm]}"], 2, ["user.kernels is fused_uvm", "data_parallel alone"]),
        (["sharding.tables.user={types: [data_parallel], ranks: [0]}"], 1, ["sharding.tables.user.types=[data_parallel], sharding.tables.user.ranks=[0]"]),
        (["sharding.tables.user.pin=[8]"], 2, ["[8]", "0 to 7"]),
        (["sharding.tables.item={types: [column_wise], min_partition: 48}"], 2, ["min_partition is 48", "embedding_dim 64", "take one of"]),
        (["sharding.tables.item={types: [column_wise], min_partition: 30}"], 2, ["min_partition", "multiple of 4", "30"]),
        (["sharding.tables.click.types=[table_row_wise]"], 2, ["click", "table_row_wise", "table_wise, column_wise, row_wise"]),
        (["sharding.foo=1"], 2, ["sharding.foo: no such key"]),
        (["train.max_steps=3"], 2, ["train: no such key"]),
        (["num_dense_parameters=-5"], 2, ["num_dense_parameters", "-5"]),
        (["sharding.plan=old.json"], 2, ["sharding.plan is old.json", "--plan old.json"]),
        (["sharding.keep_close_to=none.json"], 1, ["none.json", "No such file"]),
        (["--dry-run-rank", "8"], 2, ["--dry-run-rank is 8", "0 to 7", "fullest"]),
        (["--dry-run-rank=-1"], 2, ["--dry-run-rank is -1", "0 to 7"]),
        (["--explain", "itm"], 2, ["--explain itm", "item"]),
        (["--sweep", "size=3"], 2, ["ranks=8,16,32", "'size=3'"]),
        (["--sweep", "ranks=8,0"], 2, ["'ranks=8,0'"]),
        (["--sweep", "ranks=12"], 2, ["ranks=12", "multiple of 8"]),
        (["--sweep", "ranks=3"], 2, ["ranks=3", "4,096", "not a multiple of 3"]),
        (["--sweep", "ranks=8", "--out", "x.json"], 2, ["--sweep does not go with --out"]),
        (["--plan", "x.json", "--seed", "1"], 2, ["--plan does not go with --seed"]),
        (["--time-limit", "0"], 2, ["--time-limit", "is 0"]),
        (["--time-limit", "nan"], 2, ["--time-limit", "nan"]),
        (["--seed=-1"], 2, ["--seed", "-1"]),
        (["--out", "nowhere/plan.json"], 2, ["cannot write nowhere/plan.json", "another place"]),
        (["--html", "configs"], 2, ["cannot write configs", "folder"]),
        (["--plan", "configs/quickstart.yaml"], 1, ["configs/quickstart.yaml is not a plan", "plan again"]),
        (["--compare", "none.json"], 1, ["none.json", "No such file"]),
        (["--local-batch-size", "0"], 2, ["--local-batch-size", "is 0"]),
        (["--cluster", "8xh300"], 2, ["no cluster 8xh300", "8xh100"]),
        (["--cluster", "none.yaml"], 2, ["none.yaml", "No such file"]),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_message_before_any_search(folder, capsys, arguments, code, said):
    assert main([*of_tables(folder), "--cluster", "8xh100", *arguments]) == code
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.out == "", told
    assert all(part in told.err for part in said), told.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intra_host_gb_per_s": {"value": -3, "source": "guess"}}, ["intra_host_gb_per_s.value", "greater than 0", "-3"]),
        ({"hbm_gb": None}, ["a cuda cluster needs hbm_gb"]),
        ({"num_ranks": 12}, ["num_ranks (12)", "ranks_per_host (8)"]),
        ({"hbm_gb": 80}, ["comes with its source"]),
    ],
)  # fmt: skip
def test_a_bad_cluster_is_refused(folder, tmp_path, capsys, change, said):
    tree = yaml.safe_load((ROOT / "configs/clusters/8xh100.yaml").read_text()) | change
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(tree))
    assert main([*of_tables(folder), "--cluster", str(tmp_path / "bad.yaml")]) == 2
    told = capsys.readouterr().err
    assert all(part in told for part in ["bad.yaml", *said]), told


def test_a_plan_for_other_tables_or_ranks_is_refused_with_the_difference(folder, tmp_path, capsys):
    (tmp_path / "tables.csv").write_text(HEAD + TABLES.replace("20000000", "30000000"))
    for option in ("--plan", "--compare"):
        assert main([*of_tables(tmp_path), "--cluster", "8xh100", option, str(folder / "plan.json")]) == 1
        assert "user: num_embeddings is 20000000 in the plan, 30000000" in capsys.readouterr().err
    assert main([*of_tables(folder), "--cluster", "128xh100", "--plan", str(folder / "plan.json")]) == 1
    assert "num_ranks is 8 in the plan, 128 here" in capsys.readouterr().err


def test_ranks_that_do_not_divide_lanes_and_batch_are_refused_with_what_would(folder, tmp_path, capsys):
    tree = copy.deepcopy(TINY)
    tree["data"]["lanes"], tree["train"]["global_batch_size"] = 3, 66
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--cluster", "2xcpu", "--time-limit", "0.2"]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "data.lanes (3) must be a multiple of the number of ranks (2)" in told
    assert "train.global_batch_size (66)" in told and "start 1, 3 ranks" in told
    way = told.split("or set ")[1].split()
    assert main([*arguments, *way]) == 0
    capsys.readouterr()
    assert main([*arguments, *way, "--sweep", "local_batch=33"]) == 2
    assert "multiple of data.lanes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "configs/quickstart.yaml", "--local-batch-size", "4"], "train.global_batch_size"),
        (["--tables", "tables.csv"], "--local-batch-size"),
    ],
)
def test_the_batch_comes_from_one_place(capsys, arguments, said):
    assert main([*arguments, "--cluster", "8xh100"]) == 2
    assert said in capsys.readouterr().err
