"""`rats plan` for people: a short table with units."""

from __future__ import annotations

from rats.stages.plan.result import Comparison, Expense, Memory, Plan

FLOP_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP")
UNKNOWN = "unknown"
BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """A label and a text for each line."""
    work = plan.work
    there = work.samples - work.samples_missing
    rows = [
        ("store", work.store),
        ("samples", f"{work.samples:,} wanted, {there:,} there, {work.samples_to_make:,} to make"),
        ("prompts", plan.lengths.text),
        ("shards", f"{work.shards:,}, {work.shards_missing:,} to make"),
        ("teacher", f"{work.evaluations:,} evaluations of {flop(plan.evaluation_flops)}"),
        ("work", f"{flop(plan.flops)} in {work.forwards:,} full micro-batches"),
        ("rate", _rate(plan)),
        ("time", f"{_time(plan.worker_seconds)}{_shared(plan)}"),
        ("size", f"{size(plan.bytes_to_write)} to write{_free(plan)}"),
        ("not counted", f"loading, text encoders, rewards and their decoding ({flop(plan.decode_flops)} a picture)"),
    ]
    if plan.evaluation_flops is None:
        rows.insert(4, ("", "FLOP, time and memory are unknown: the network reads values of tensors; time one shard"))
    if plan.usd is not None:
        rows.insert(8, ("cost", f"{plan.usd:,.2f} USD at {plan.price:.2f} USD an hour of a worker"))
    if plan.loras:
        rows.insert(0, ("LoRAs", f"{', '.join(plan.loras)}, fused into the network"))
    memory = [("memory", "of a device at most, in tensors"), ("  rollout", _memory(plan.rollout_memory))]
    return [*rows, *memory, ("  training", _memory(plan.train_memory)), *_comparison(plan.comparison)]


def _memory(memory: Memory | None) -> str:
    """The sum and its parts, the largest first. Parts below 1 % are only in the sum."""
    if memory is None:
        return UNKNOWN
    parts = sorted(((value, name) for name, value in memory.parts.items() if value >= memory.peak / 100), reverse=True)
    named = ", ".join(f"{name} {size(value)}" for value, name in parts)
    count = memory.stand_ins
    one = f"; {count} reward{'s' if count > 1 else ''} not on this disk, as ViT-H-14" if count else ""
    return f"{size(memory.peak)} ({named}{one})"


def _comparison(found: Comparison) -> list[tuple[str, str]]:
    heading = f"{found.experiments} of {found.steps:,} steps of {found.batch:,} samples: the teacher's part"
    first = "the first experiment" if found.pays_from == 1 else f"experiment {found.pays_from:,}"
    return [
        ("experiments", heading),
        ("  stored", f"{_expense(found.stored)}, once"),
        ("  live", _expense(found.live)),
        ("  pays", f"stored trajectories cost less from {first} on"),
    ]


def _expense(expense: Expense) -> str:
    usd = "" if expense.usd is None else f", {expense.usd:,.2f} USD"
    return f"{expense.evaluations:,} evaluations, {_time(expense.worker_seconds)}{usd}"


def _time(seconds: float | None) -> str:
    return f"time {UNKNOWN}" if seconds is None else f"{clock(seconds)} on one worker"


def _rate(plan: Plan) -> str:
    if plan.rate is None:
        return UNKNOWN
    how = f"measured here on {plan.device}" if plan.rate_measured else f"as given for {plan.device}"
    return f"{flop(plan.rate)}/s a worker, {how}"


def _shared(plan: Plan) -> str:
    if plan.workers == 1 or plan.seconds is None:
        return ""
    return f", {clock(plan.seconds)} on {plan.workers} if none slows another"


def _free(plan: Plan) -> str:
    if plan.bytes_free is None:
        return " to a remote store"
    short = "" if plan.bytes_free > plan.bytes_to_write else ": NOT ENOUGH"
    return f", {size(plan.bytes_free)} free there{short}"


def flop(count: float | None) -> str:
    """Three digits and a unit."""
    if count is None:
        return f"{UNKNOWN} FLOP"
    return _scaled(count, 1000, FLOP_UNITS)


def size(count: float) -> str:
    """Three digits and a binary unit."""
    return _scaled(count, 1024, BYTE_UNITS)


def clock(seconds: float) -> str:
    """Minutes and seconds; from an hour on, hours and minutes: "4:10 min", "12:30 h"."""
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 3600:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,}:{minutes:02d} h"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while value >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g} {units[power]}" if value < 1000 else f"{value:.0f} {units[power]}"
