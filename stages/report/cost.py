"""The report's section on reuse and cost: what was rolled out, and how often it was read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rats.schemas.params import Params, with_variant
from rats.schemas.run import RunRecord
from rats.stages.templates.render import PageData


def cost_block(params: Params, records: Mapping[str, RunRecord], rollouts: Mapping[str, PageData]) -> PageData:
    """The section's summary and tables, from run.json of every run and the rollouts' reports."""
    tables = [_runs(params, records)]
    if rollouts:
        tables.insert(0, _rollouts(params, rollouts))
    return {"summary": _summary(params, records), "tables": tables}


def _summary(params: Params, records: Mapping[str, RunRecord]) -> str:
    drawn = sum(_read(params, name, record) for name, record in records.items())
    forwards = _total(record.teacher_forwards for record in records.values())
    scored = _total(record.teacher_reward_calls for record in records.values())
    live = drawn * params.teacher.evaluations
    return (
        f"{len(records)} training runs read {drawn:,} teacher trajectories from the same shards. During training the "
        f"teacher ran {forwards} times and {scored} of its samples were scored, as measured in the runs. With a "
        f"live teacher the same training would have taken {live:,} teacher evaluations more."
    )


def _total(counts: Iterable[int | None]) -> str:
    """Their sum; "?" where an older rats, which did not keep them, has trained a run in part."""
    known = list(counts)
    return "?" if None in known else f"{sum(filter(None, known)):,}"


def _read(params: Params, name: str, record: RunRecord) -> int:
    """Number of trajectories that a run has read. With a live teacher it reads only their noise: 0."""
    return 0 if record.teacher_mode == "live-ema" else record.steps * with_variant(params, name).batch


def _rollouts(params: Params, rollouts: Mapping[str, PageData]) -> PageData:
    columns = ["rollout", "samples", "evaluations a sample", "shards", "reused", "teacher forwards now", "time"]
    rows = [
        [
            name,
            f"{report.get('samples', 0):,}",
            f"{params.teacher.evaluations:,}",
            report.get("shards_total", "–"),
            report.get("shards_reused", "–"),
            f"{report.get('teacher_forwards', 0):,}",
            duration(report.get("seconds")),
        ]
        for name, report in rollouts.items()
    ]
    return {"columns": columns, "rows": rows}


def _runs(params: Params, records: Mapping[str, RunRecord]) -> PageData:
    columns = ["run", "gate", "steps", "trajectories read", "teacher runs", "teacher scored", "a step", "time"]
    rows = [
        [
            name,
            _gate(record),
            record.steps,
            f"{_read(params, name, record):,}",
            _total([record.teacher_forwards]),
            _total([record.teacher_reward_calls]),
            f"{record.seconds_per_step:.2f} s",
            duration(record.seconds),
        ]
        for name, record in records.items()
    ]
    return {"columns": columns, "rows": rows}


def _gate(record: RunRecord) -> str:
    mean = "" if record.gate_mean is None else f", mean {record.gate_mean:.3f}"
    return f"{record.gate_form}{mean}"


def duration(seconds: float | None) -> str:
    """`48 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 1 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
