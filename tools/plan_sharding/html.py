"""The report as one self-contained HTML file: bars of every rank's milliseconds and bytes, the tables, the gap, the request."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from dlrm_scale.sharding.options import STAGES
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.sharding.problem import SCORED_STAGES
from dlrm_scale.sharding.search import Found
from tools.charts import page
from tools.plan_sharding.show import ms, ranks_said, replica_groups_said

WIDTH, HEIGHT, GAP = 1100, 240, 0.15  # pixels; the space between bars as a part of a bar
COLOURS = ("#4e79a7", "#a0cbe8", "#f28e2b", "#ffbe7d", "#59a14f", "#8cd17d", "#b6992d", "#e15759", "#79706e", "#d37295")


def write_html(plan: Plan, found: Found, seconds: float, path: Path) -> None:
    cluster = plan.request.cluster
    usable = cluster.table_bytes_per_rank / 1e9
    stages = [stage for stage in STAGES if any(load.step_ms[stage] for load in plan.ranks)]
    unscored = ", ".join(stage for stage in stages if stage not in SCORED_STAGES)
    kinds = [kind for kind in plan.ranks[0].device_bytes if any(load.device_bytes[kind] for load in plan.ranks)]
    host_kinds = [k for k in plan.ranks[0].host_bytes if any(load.host_bytes[k] for load in plan.ranks)]
    parts = [
        f"<h1>Sharding plan {escape(plan.fingerprint)}</h1>",
        f"<p>{len(plan.tables)} tables on {cluster.num_ranks} {cluster.device} ranks, local batch {plan.request.local_batch_size:,}.</p>",
        f"<p>{escape(replica_groups_said(plan) or '')}</p>",
        _gap(plan, found, seconds),
        "<h2>Milliseconds a step, by rank and stage</h2>",
        _bars([[load.step_ms[s] for s in stages] for load in plan.ranks], stages, "ms", limit=None),
        f"<p>The plan's score, TorchRec's, does not count {unscored}.</p>" if unscored else "",
        "<h2>Device memory, by rank and kind</h2>",
        _bars([[load.device_bytes[k] / 1e9 for k in kinds] for load in plan.ranks], kinds, "GB", limit=usable),
    ]
    if host_kinds:
        rows = [[load.host_bytes[k] / 1e9 for k in host_kinds] for load in plan.ranks]
        parts += [
            "<h2>Host memory, by rank and kind</h2>",
            _bars(rows, host_kinds, "GB", cluster.host_bytes_per_rank / 1e9),
        ]
    parts += ["<h2>Tables</h2>", _tables(plan), "<h2>Request</h2>", f"<pre>{escape(_request(plan))}</pre>"]
    path.write_text(page(f"Sharding plan {plan.fingerprint}", parts), encoding="utf-8")


def _gap(plan: Plan, found: Found, seconds: float) -> str:
    search = "read from a file" if not found.num_rounds and not found.history else f"found in {seconds:.1f} s"
    cut = " The time limit cut the search short." if found.cut_short else ""
    history = ""
    if len(found.history) > 1:
        rows = "".join(
            f"<tr><td class='n'>{s:.2f}</td><td class='n'>{ms(score)}</td></tr>" for s, score in found.history[-12:]
        )
        history = f"<details><summary>gains during the search</summary><table><tr><th>s</th><th>score ms</th></tr>{rows}</table></details>"
    return (
        f"<p><b>{ms(plan.score_ms)} ms</b> ({escape(plan.request.sharding.objective.replace('_', ' '))}), {search}; no plan of this "
        f"request can be under <b>{ms(plan.bound_ms)} ms</b>: gap <b>{plan.gap:.2%}</b>.{cut}</p>{history}"
    )


def _bars(values: list[list[float]], names: list[str], unit: str, limit: float | None) -> str:
    """Stacked columns, one a rank; `limit` draws a line."""
    top = max([sum(row) for row in values] + ([limit] if limit else [])) * 1.05 or 1.0
    step = WIDTH / len(values)
    shapes = []
    for rank, row in enumerate(values):
        y = float(HEIGHT)
        told = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, row, strict=True) if value)
        shapes.append(f"<g><title>rank {rank}: {sum(row):.4g} {unit} ({escape(told)})</title>")
        for index, value in enumerate(row):
            height = value / top * HEIGHT
            y -= height
            shapes.append(
                f"<rect x='{rank * step + step * GAP / 2:.2f}' y='{y:.2f}' width='{step * (1 - GAP):.2f}' "
                f"height='{height:.2f}' fill='{COLOURS[index % len(COLOURS)]}'/>"
            )
        shapes.append("</g>")
    if limit:
        y = HEIGHT - limit / top * HEIGHT
        shapes.append(f"<line x1='0' x2='{WIDTH}' y1='{y:.1f}' y2='{y:.1f}' stroke='#c00' stroke-dasharray='6 4'/>")
        shapes.append(f"<text x='4' y='{y - 4:.1f}' font-size='12' fill='#c00'>{limit:.4g} {unit} a rank</text>")
    keys = (
        f"<span><i style='background:{COLOURS[i % len(COLOURS)]}'></i>{escape(name)}</span>"
        for i, name in enumerate(names)
    )
    sums = [sum(row) for row in values]
    told = f"<p>least {min(sums):.4g}, mean {sum(sums) / len(sums):.4g}, most {max(sums):.4g} {unit} (rank {sums.index(max(sums))})</p>"
    return f"<div class='key'>{''.join(keys)}</div><svg viewBox='0 0 {WIDTH} {HEIGHT}'>{''.join(shapes)}</svg>{told}"


def _tables(plan: Plan) -> str:
    head = "<tr><th>table</th><th class='n'>rows</th><th class='n'>dim</th><th>type</th><th class='n'>ids a sample</th><th>sharding</th><th>kernel</th><th>ranks</th></tr>"
    rows: Iterable[str] = (
        f"<tr><td>{escape(name)}</td><td class='n'>{(spec := plan.request.tables[name]).num_embeddings:,}</td>"
        f"<td class='n'>{spec.embedding_dim}</td><td>{spec.data_type}</td>"
        f"<td class='n'>{sum(spec.expected_ids_by_feature.values()):.4g}</td><td>{table.sharding_type}</td>"
        f"<td>{table.compute_kernel}{f' {table.cache_load_factor:g}' if table.cache_load_factor else ''}</td>"
        f"<td>{ranks_said(plan, name)}</td></tr>"
        for name, table in plan.tables.items()
    )
    return f"<div class='scroll'><table>{head}{''.join(rows)}</table></div>"


def _request(plan: Plan) -> str:
    return plan.request.model_copy(update={"tables": {}}).model_dump_json(indent=1)
