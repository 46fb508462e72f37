"""What was measured as two tables, in the form that docs/formats.md has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXACT, HALF = 1e-5, 1e-3
"""The largest error of a layer that is rounding, of float32 and of half precision."""

Results = Mapping[str, Mapping[str, Any]]


def is_exact(case: str, found: Mapping[str, Any]) -> bool:
    """Say whether every layer was applied, and no other, but for the file's own rounding."""
    if "layers" not in found or found["left_out"] or found["added"]:
        return False
    return bool(found["error"] < (HALF if "half precision" in case else EXACT))


def format_ours(read: Mapping[str, Results]) -> str:
    """Lay out what programs made of our files: a row for cases that went alike everywhere."""
    programs = list(read)
    rows: dict[tuple[str, ...], list[str]] = {}
    cases = {case: None for results in read.values() for case in results}
    for case in cases:
        cells = tuple(_tell(case, read[program].get(case)) for program in programs)
        rows.setdefault((case.partition("|")[2], *cells), []).append(case.partition("|")[0])
    lines = [_row(["of ours", "format", *programs]), _row(["---"] * (2 + len(programs)))]
    lines += [_row(["; ".join(names), *cells]) for cells, names in rows.items()]
    worst = max(
        found["error"]
        for results in read.values()
        for case, found in results.items()
        if is_exact(case, found) and "half precision" not in case
    )
    return "\n".join([*lines, "", f"all: every layer, largest relative error {worst:.0e}."])


def format_theirs(written: Mapping[str, Results]) -> str:
    """Lay out what we made of each program's files."""
    lines = [_row(["writer", "of theirs", "read here"]), _row(["---"] * 3)]
    for program, results in written.items():
        exact = [case for case, found in results.items() if is_exact(case, found)]
        if exact:
            worst = max(results[case]["error"] for case in exact)
            lines.append(_row([program, "; ".join(exact), f"all layers, {worst:.0e}"]))
        for case, found in results.items():
            if case not in exact:
                told = found.get("refused") or found.get("failed") or _tell(case, found)
                lines.append(_row([program, case, told.partition(" (")[0]]))
    return "\n".join(lines)


def _tell(case: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    if "refused" in found:
        return "stops"
    if is_exact(case, found):
        return "all"
    left = len(found["left_out"])
    if left == found["layers"]:
        return "nothing"
    told = [f"without {left} of {found['layers']}"] if left else []
    if found["error"] >= (HALF if "half precision" in case else EXACT):
        told.append(f"off by up to {found['error']:.1g}")
    return ", ".join(told) or f"{len(found['added'])} layers too many"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
