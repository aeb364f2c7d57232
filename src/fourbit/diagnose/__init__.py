"""What `fourbit doctor` looks at: facts about this machine and installation, and what is wrong with them.

A check is a function that returns a `Finding`; none raises, none imports more than it needs, and none
changes anything. `machine` asks the operating system, `software` asks Python and the libraries.
"""

from __future__ import annotations

from collections.abc import Callable

from fourbit.diagnose.finding import Fact, Finding, Problem
from fourbit.diagnose.machine import check_cards, check_cores, check_memory, check_python
from fourbit.diagnose.software import (
    check_compute,
    check_native,
    check_packages,
    check_torch,
    check_triton,
)

__all__ = ["Fact", "Finding", "Problem", "diagnose"]

_CHECKS: tuple[Callable[[], Finding], ...] = (
    check_cores,
    check_memory,
    check_cards,
    check_python,
    check_packages,
    check_torch,
    check_native,
    check_triton,
    check_compute,
)


def diagnose() -> Finding:
    """All facts in the order to read them, and all problems."""
    findings = [check() for check in _CHECKS]
    return Finding(
        facts=tuple(fact for finding in findings for fact in finding.facts),
        problems=tuple(problem for finding in findings for problem in finding.problems),
    )
