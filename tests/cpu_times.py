"""Measures the CPU time of each test with its child processes, since wall time depends on other work on the machine."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

SHOWN = 25
_KEY = "cpu_seconds"


def _cpu_seconds() -> float:
    """User and system time of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


class CpuTimes:
    """Measures every test, doctests included, and ends a run with the sum and the slowest tests.

    A fixture of a module or of the session counts for the first test that asks for it.
    """

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        item.stash[_started] = _cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "teardown":  # a report's properties reach the process that prints, from any worker
            report.user_properties.append((_KEY, _cpu_seconds() - item.stash[_started]))
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        times = {
            report.nodeid: seconds
            for reports in terminalreporter.stats.values()
            for report in reports
            for key, seconds in getattr(report, "user_properties", ())
            if key == _KEY
        }
        if len(times) <= SHOWN:
            return
        terminalreporter.section(f"{sum(times.values()):.0f} CPU seconds in {len(times)} tests; the slowest {SHOWN}")
        for nodeid in sorted(times, key=lambda nodeid: -times[nodeid])[:SHOWN]:
            terminalreporter.write_line(f"{times[nodeid]:7.2f}  {nodeid}")


_started = pytest.StashKey[float]()
