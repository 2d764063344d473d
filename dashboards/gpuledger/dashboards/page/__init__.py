"""The built-in page: the same boards as in Grafana, live, from one process and one origin."""

from __future__ import annotations

from gpuledger.dashboards.page.app import PageSettings, create_app
from gpuledger.dashboards.page.server import serve

__all__ = ["PageSettings", "create_app", "serve"]
