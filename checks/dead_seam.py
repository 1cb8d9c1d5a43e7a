"""A pytest plugin: with the pack's call seam dead, every test that goes through it has to fail.

    PYTHONPATH=checks pytest -p dead_seam tests/comfy

APPLY_MODEL's wrapper only calls the executor, so each MODEL gives what stock gives. A test in which it was reached and
which passes nevertheless would also pass if the pack did nothing: here it fails, and those that fail pass. Tests that
never reach it, as those of settings do not, are left alone.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest

PACK = "custom_nodes frame-thrift"

# Tests that claim no effect, by their names; each of them has to pass in at least one of its forms.
MAY_PASS = {
    "test_a_model_called_without_a_sampler_is_stock": "without a schedule nothing is frozen",
    "test_one_that_waits_at_every_step": "it waits around the sampler's evaluations, outside of any forward",
    "test_transformer_options_replaced_after_us": "another node has thrown the plan away, and that is said",
}


@dataclass
class Seam:
    """Whether the running test has reached it, how many have, and which of MAY_PASS have passed."""

    is_reached: bool = False
    reached: int = 0
    passed: set[str] = field(default_factory=set)


SEAM = Seam()


def dead(executor: Any, *args: Any, **kwargs: Any) -> Any:
    SEAM.is_reached = True
    return executor(*args, **kwargs)


def pytest_collection_finish(session: pytest.Session) -> None:
    from comfy.model_patcher import ModelPatcher
    from comfy.patcher_extension import WrappersMP

    add = ModelPatcher.add_wrapper_with_key

    def adding(patcher: Any, kind: str, key: str, wrapper: Any) -> None:
        is_ours = getattr(wrapper, "__module__", "").startswith(PACK)
        add(patcher, kind, key, dead if is_ours and kind == WrappersMP.APPLY_MODEL else wrapper)

    ModelPatcher.add_wrapper_with_key = adding


def pytest_runtest_setup(item: pytest.Item) -> None:
    SEAM.is_reached = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when != "call" or report.skipped or not SEAM.is_reached:
        return report
    SEAM.reached += 1
    name = item.originalname
    if report.failed:
        report.outcome, report.longrepr = "passed", None
    elif name in MAY_PASS:
        SEAM.passed.add(name)
    else:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} passes though the pack does nothing. Make it assert its effect, or name it in "
            "checks/dead_seam.py if it claims none."
        )
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    collected = {item.originalname for item in session.items if isinstance(item, pytest.Function)}
    complaints = [
        f"{name} does not pass: take it off MAY_PASS" for name in MAY_PASS.keys() & collected - SEAM.passed
    ]
    if not SEAM.reached:
        complaints.append("no test reached the seam: does the pack still wrap APPLY_MODEL?")
    for complaint in complaints:
        print(f"\nchecks/dead_seam.py: {complaint}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
