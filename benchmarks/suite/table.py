"""Records as tables: one per case with all its providers, and one of all cases with one or two rows per case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .case import AGAIN, CALLED, LEFT_OUT, SPENT
from .measure import Figures

PRECISIONS = ("fp32", "TF32", "bf16")  # from fine to coarse
_REASONS = {"wrong": "WRONG", "failed": "FAILED", "unavailable": "unavailable"}


def duration(seconds: float) -> str:
    """Returns a time with three digits and a unit."""
    unit, scale = ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1)
    value = seconds * scale
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def ratio(value: float) -> str:
    return f"{value:.2f}x" if 0.1 <= value < 9.95 else f"{value:.2g}x" if value < 99.5 else f"{value:,.0f}x"


def row(cells: Iterable[str]) -> str:
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def is_ours(name: str) -> bool:
    return name.startswith("fastsde")


def timed(record: Figures) -> dict[str, Figures]:
    """Returns the providers that have a time, without the baseline's second one."""
    found = record.get("providers", {}).items()
    return {name: each for name, each in found if "median_s" in each and not name.endswith(AGAIN)}


def without_time(record: Figures) -> list[str]:
    """Returns why providers have no time here, except for those that are meant for another device."""
    if "failed" in record:
        return [record["failed"]]
    found = []
    for name, each in record["providers"].items():
        found += [f"{name} ({word})" for key, word in _REASONS.items() if key in each and key != "unavailable"]
        if "GPU" not in each.get("unavailable", "GPU"):
            found.append(f"{name} ({each['unavailable']})")
    return found


def is_cut(record: Figures) -> bool:
    """Returns whether the time limit left out rounds or providers."""
    spent = any(each.get("unavailable") == SPENT for each in record["providers"].values())
    return bool(record.get("cut")) or spent


def has_replays(record: Figures) -> bool:
    """Returns whether it was timed by replaying CUDA graphs, except for providers that cannot be captured."""
    return any("host_s" in each for each in timed(record).values())


def timed_by_calls(record: Figures, name: str) -> bool:
    """Returns whether a provider's time includes the host, while others are timed by replaying a CUDA graph."""
    return bool(record["providers"][name].get("timed_by") == CALLED)


def noise(record: Figures) -> float | None:
    """Returns the relative difference between the two medians of the baseline, or None without them."""
    both = [record["providers"].get(record["baseline"] + end, {}).get("median_s") for end in ("", AGAIN)]
    return abs(both[1] / both[0] - 1) if all(both) else None


# One case -----------------------------------------------------------------------------------------------------------


def show(record: Figures) -> list[str]:
    """Returns the lines of a case's table."""
    lines = [f"{record['name']}: {record['what']}"]
    if "failed" in record:
        return [*lines, f"  {'' if record['failed'].startswith(LEFT_OUT) else 'failed: '}{record['failed']}"]
    columns = f"{'median':>10}{'20 % .. 80 %':>22}{'speed':>16}{'of limit':>10}{'first call':>12}"
    columns += f"{'peak':>11}" * any("peak_bytes" in each for each in record["providers"].values())
    columns += f"{'host':>11}" * has_replays(record)
    lines.append(f"  {'':38}{columns}".rstrip())
    lines += [_line(record, name, each) for name, each in record["providers"].items()]
    return lines + list(_notes(record))


def _line(record: Figures, name: str, each: Figures) -> str:
    if "median_s" not in each:
        key, reason = next((key, each[key]) for key in _REASONS if key in each)
        reason = reason if reason.startswith(LEFT_OUT) else f"{_REASONS[key]}: {reason}"
        return f"  {name:38}  {reason}"
    spread = f"{duration(each['p20_s'])} .. {duration(each['p80_s'])}"
    share = f"{each['of_limit']:.0%}" if each.get("limit_s") else ""
    first = f"{each['first_call_s']:.2f} s" if "first_call_s" in each else ""
    peak = f"{each['peak_bytes_of_its_own'] / 2**20:.0f} MiB" if "peak_bytes" in each else ""
    host = duration(each["host_s"]) if "host_s" in each else ""
    cells = f"{duration(each['median_s']):>10}{spread:>22}{speed(record, name):>16}{share:>10}{first:>12}{peak:>11}"
    cells += f"{host:>11}"
    return f"  {name:38}{cells}".rstrip()


def speed(record: Figures, name: str) -> str:
    """Returns the speed relative to the baseline, with "slower" if the difference exceeds the spread of both."""
    base, each = record["providers"].get(record["baseline"], {}), record["providers"][name]
    if "median_s" not in base:
        return ""
    slower = each["p20_s"] > base["p80_s"]
    return f"{'slower, ' if slower else ''}{ratio(base['median_s'] / each['median_s'])}"


def _notes(record: Figures) -> Iterable[str]:
    if is_cut(record):
        rounds = max((each["rounds"] for each in timed(record).values()), default=0)
        yield f"  cut by the time limit: at most {rounds} rounds, or fewer providers; raise it with --minutes"
    if has_replays(record):
        yield "  median: GPU time per call in a replayed CUDA graph; host: time of Python and the driver per call"
    for name, each in timed(record).items():
        if timed_by_calls(record, name):
            yield f"  {name} is timed by calls, including the host: {each['not_captured']}"
    for each in timed(record).values():
        if "network_s" in each.get("parity", {}):
            alone, share = each["parity"]["network_s"], each["parity"]["network_share"]
            yield f"  the baseline's network alone, called as it is there: {duration(alone)}, {share:.0%} of the time"
    apart = noise(record)
    if apart is not None:
        yield f"  noise (the baseline compared with itself): {apart:.1%}"
    limits = {(each["limited_by"], each["limit_s"], each["precision"]) for each in timed(record).values()}
    for by, limit, precision in sorted(limits, key=lambda each: -each[1]):
        if limit:
            yield f"  limit in {precision}: {duration(limit)}, set by {by}"
    for target in record["targets"]:
        verdict = {True: "met", False: "NOT met", None: "not measured"}[target["met"]]
        value = "" if target["value"] is None else f": {target['value']:.3g}"
        yield f"  target {verdict}: {target['what']}{value}"


# All cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """A case in one precision or a finer one: the baseline, the fastest other provider, and fastsde's fastest."""

    record: Figures
    precision: str
    ours: str
    other: str | None

    def median(self, name: str) -> float:
        value: float = self.record["providers"][name]["median_s"]
        return value

    @property
    def cells(self) -> tuple[str, ...]:
        base, ours = self.record["baseline"], self.record["providers"][self.ours]
        has_base = "median_s" in self.record["providers"].get(base, {})
        return (
            self.record["what"],
            self._timed(base, "") if has_base else "",
            self._timed(self.other, self.other) if self.other else "",
            self._timed(self.ours, self.ours if "." in self.ours else self.ours.removeprefix("fastsde").strip(" ,")),
            ratio(self.median(base) / ours["median_s"]) if has_base else "",
            ratio(self.median(self.other) / ours["median_s"]) if self.other else "",
            f"{ours['of_limit']:.0%}" if ours.get("limit_s") else "",
        )

    def _timed(self, name: str, shown: str) -> str:
        """Returns a median with the provider's name, and "by calls" if it was timed differently from the others."""
        words = ", ".join(filter(None, (shown, "by calls" if timed_by_calls(self.record, name) else "")))
        return f"{duration(self.median(name))} ({words})" if words else duration(self.median(name))


def headlines(record: Figures) -> list[Headline]:
    """Returns one headline for each precision in which fastsde is faster than in any finer one."""
    rows, found = [], timed(record)
    for place, precision in enumerate(PRECISIONS):
        allowed = {name: each for name, each in found.items() if each["precision"] in PRECISIONS[: place + 1]}

        order = sorted(allowed, key=lambda name, allowed=allowed: allowed[name]["median_s"])
        ours = next(filter(is_ours, order), None)
        other = next((name for name in order if not is_ours(name) and name != record["baseline"]), None)
        if ours is not None and allowed[ours]["precision"] == precision:
            rows.append(Headline(record, precision, ours, other))
    return rows


TITLES = ("task", "baseline", "fastest other", "fastsde", "faster than baseline", "than other", "of limit")


def overview(records: Sequence[Figures]) -> list[str]:
    """Returns the table of all cases as lines with aligned columns."""
    rows = [TITLES, *(row.cells for record in records for row in headlines(record))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(TITLES))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
