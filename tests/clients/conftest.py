"""Prints the tables of what was measured after the tests of other programs."""

from __future__ import annotations

from typing import Any

import pytest

MEASURED: pytest.StashKey[dict[str, dict[str, Any]]] = pytest.StashKey()
"""By task, ``read`` or ``write``, what each program did."""


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> dict[str, dict[str, Any]]:
    """Where results are collected for the tables."""
    return pytestconfig.stash.setdefault(MEASURED, {"read": {}, "write": {}})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print both tables, as far as there is something to print."""
    from clients.tables import format_ours, format_theirs

    found = config.stash.get(MEASURED, {"read": {}, "write": {}})
    for task, title, lay_out in (
        ("read", "Ours, in other programs", format_ours),
        ("write", "Theirs, here", format_theirs),
    ):
        if found[task]:
            terminalreporter.section(title)
            terminalreporter.write_line(lay_out(found[task]))
