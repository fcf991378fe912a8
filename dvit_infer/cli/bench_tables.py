"""Tables that dvit-bench prints: candidates, keep rates and nodes, each with a summary line."""

from collections.abc import Iterator, Mapping, Sequence

from dvit_infer.benchmark.base import BaseComparison
from dvit_infer.benchmark.load import describe_load
from dvit_infer.benchmark.outcome import Outcome, PruningSpeedup
from dvit_infer.benchmark.roofline import NodeTime
from dvit_infer.benchmark.timing import Row
from dvit_infer.utils.tables import table
from dvit_infer.utils.threads import describe_threads


def heading(comparison: BaseComparison, where: Mapping[str, str | None], load: int = 0) -> str:
    """Return two lines: model, machine, load and baseline; the backend, and on a CPU its threads."""
    beside = f", {describe_load(load)}" if load else ""
    first = f"{comparison.title} on {where['machine']}, torch {where['torch']}{beside}"
    threads = f"; {describe_threads()}" if comparison.device.type == "cpu" else ""
    return f"{first}; speed-up over {comparison.baseline}\n{comparison.runs}{threads}"


def report_of(outcomes: Mapping[int, Outcome], nodes: Mapping[int, Sequence[NodeTime]]) -> str:
    """Return all tables, by batch size."""
    return "\n".join(_parts(outcomes, nodes))


def _parts(outcomes: Mapping[int, Outcome], nodes: Mapping[int, Sequence[NodeTime]]) -> Iterator[str]:
    yield _candidates([row for outcome in outcomes.values() for row in outcome.rows])
    for batch, outcome in outcomes.items():
        if len(outcome.pruning_speedups) > 1:
            yield _pruning_speedups(outcome.pruning_speedups, batch)
        lines = [str(pruning) for pruning in outcome.pruning_speedups if len(outcome.pruning_speedups) == 1]
        yield from (f"batch {batch}: {line}" for line in (*lines, outcome.verdict, outcome.noise) if line)
    for batch, times in nodes.items():
        yield _nodes(times, batch)
        yield f"batch {batch}: {_by_kind(times)}"


def _candidates(rows: Sequence[Row]) -> str:
    columns = (
        *(">batch", "runtime", ">keep rate", ">images/s", ">p20", ">p80", ">p50 ms", ">p99 ms", ">GMACs"),
        *(">speed-up", ">peak MiB", ">max error", ">top-1"),
    )
    cells = [
        (
            str(row.batch),
            row.runtime if row.variant is None else f"{row.runtime} ({row.variant})",
            _known(row.keep_rate, ".3g"),
            f"{row.images_per_s:.1f}",
            f"{row.p20_images_per_s:.1f}",
            f"{row.p80_images_per_s:.1f}",
            f"{row.p50_ms:.2f}",
            f"{row.p99_ms:.2f}",
            _known(row.gmacs, ".3f"),
            f"{row.speedup:.2f} x",
            _known(row.peak_mib, ".0f"),
            _known(row.max_logit_error, ".1e"),
            _known(row.top1_agreement, ".1%"),
        )
        for row in rows
    ]
    return table(columns, cells)


def _known(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _pruning_speedups(pruning_speedups: Sequence[PruningSpeedup], batch: int) -> str:
    columns = ("keep rate", "patches kept", ">GMACs", ">images/s", ">over dense", ">allowed", ">realised")
    cells = [
        (
            f"{pruning.keep_rate:g}",
            ",".join(map(str, pruning.num_keep)),
            f"{pruning.gmacs:.3f}",
            f"{pruning.images_per_s:.1f}",
            f"{pruning.speedup:.3f} x",
            f"{pruning.ceiling:.3f} x",
            f"{pruning.speedup / pruning.ceiling:.1%}",
        )
        for pruning in pruning_speedups
    ]
    return table(columns, cells, title=f"batch {batch}: pruned over dense engine, and what the MACs allow")


def _nodes(times: Sequence[NodeTime], batch: int) -> str:
    spent, floor = sum(t.seconds for t in times), sum(t.floor_s for t in times)
    columns = (
        *("node", "kind", ">GMACs", ">MiB", ">floor us", "bound by", ">us", ">of its floor", ">share"),
        *(">saves us", ">max error"),
    )
    rows = [
        (
            t.node.name,
            t.node.kind,
            f"{t.gmacs:.3f}",
            f"{t.bytes_moved / 2**20:.1f}",
            f"{t.floor_s * 1e6:.0f}",
            t.bound,
            f"{t.seconds * 1e6:.0f}",
            f"{t.floor_s / t.seconds:.0%}",
            f"{t.seconds / spent:.1%}",
            "" if t.saves_s is None else f"{t.saves_s * 1e6:.0f}",
            "-" if t.max_error is None else f"{t.max_error:.1e}",
        )
        for t in times
    ]
    total = (
        *("total", "", f"{sum(t.gmacs for t in times):.3f}", f"{sum(t.bytes_moved for t in times) / 2**20:.1f}"),
        *(f"{floor * 1e6:.0f}", "", f"{spent * 1e6:.0f}", f"{floor / spent:.0%}", "100.0%", "", ""),
    )
    title = f"batch {batch}: time of every node; its floor at the measured limits, as if caches kept nothing"
    return table(columns, rows, title=title, total=total)


def _by_kind(times: Sequence[NodeTime]) -> str:
    """Return the share of time of each kind of node, longest first, and the share of it that is its floor."""
    spent: dict[str, float] = {}
    floor: dict[str, float] = {}
    for t in times:
        spent[t.node.kind] = spent.get(t.node.kind, 0.0) + t.seconds
        floor[t.node.kind] = floor.get(t.node.kind, 0.0) + t.floor_s
    total = sum(spent.values())
    kinds = sorted(spent, key=lambda kind: -spent[kind])
    shares = [(kind, spent[kind] / total, floor[kind] / spent[kind]) for kind in kinds]
    return "; ".join(f"{kind} {share:.1%} of the time, {least:.0%} of it its floor" for kind, share, least in shares)
