"""How long from `gpuledger up` to the page, and to the first cost on it: `python benchmarks/start_time.py`.

Each run has a fresh data directory, and a second start on the same one, where the page may show the minutes of the
first. What is downloaded once (jars, the chart library) is fetched before. Times are those of the page's JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import urllib.request
from decimal import Decimal
from pathlib import Path
from typing import Any

from installation import Installation, installation, print_result

from gpuledger.local.jars import echarts_file, kafka_jars

_GIVE_UP_S = 120.0


def first_cost_s(up: Installation) -> float:
    """Seconds from the start until the panel "Cost per second" has a row of more than nothing."""
    url = f"{up.running.page_url}api/board/live"
    while time.monotonic() - up.started_s < _GIVE_UP_S:
        up.check()
        with urllib.request.urlopen(url, timeout=30) as answer:
            panels: dict[str, Any] = json.load(answer)["panels"]
        rows: list[list[Any]] = panels["cost-rate"]["rows"]
        # A row is in the order of the panel's columns: currency, cost per second, cost per hour.
        if any(row[1] is not None and Decimal(str(row[1])) > 0 for row in rows):
            return time.monotonic() - up.started_s
        time.sleep(0.1)
    raise SystemExit(f"no cost on the page after {_GIVE_UP_S:.0f} s")


def measure(directory: Path) -> tuple[float, float]:
    """(page, first cost) in seconds."""
    with installation(directory) as up:
        page_s = time.monotonic() - up.started_s
        return page_s, first_cost_s(up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    kafka_jars()
    echarts_file()
    rows: list[tuple[str, str, str]] = []
    result: list[dict[str, Any]] = []
    for run in range(1, arguments.runs + 1):
        with tempfile.TemporaryDirectory() as temporary:
            for what in ("fresh data", "same data again"):
                page_s, cost_s = measure(Path(temporary))
                rows.append((f"{run}: {what}", f"{page_s:.1f}", f"{cost_s:.1f}"))
                result.append({"run": run, "data": what, "page_s": round(page_s, 2), "first_cost_s": round(cost_s, 2)})
    print_result("start_time", ("run", "page, s", "first cost, s"), rows, {"runs": result})


if __name__ == "__main__":
    main()
