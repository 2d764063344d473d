"""Shared services for all tests; each is started by the first test that asks for it."""

from __future__ import annotations

from typing import Any

import pytest

pytest_plugins = ["tests.fixtures.kafka", "tests.fixtures.clickhouse"]

#: Takes five minutes on its own, and little of the machine: begun last it would hold up the end of the run for as long.
_FIRST = "tests/soak/test_soak.py"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files to processes as `--dist loadfile` does it, but for the soak, which is begun first."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class SoakFirst(LoadFileScheduling):
        def _assign_work_unit(self, node: Any) -> None:
            if _FIRST in self.workqueue:
                self.workqueue.move_to_end(_FIRST, last=False)
            super()._assign_work_unit(node)

    return SoakFirst(config, log)
