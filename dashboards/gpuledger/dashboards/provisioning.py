"""Everything `gpuledger dashboards build` writes: dashboards and the YAML that makes a Grafana find them by itself.

The tree is the one Grafana reads: mount it as /etc/grafana/provisioning, with dashboards/json beside the YAML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from gpuledger.dashboards.grafana import DATA_SOURCE_TYPE, dashboard
from gpuledger.dashboards.panels import Board

__all__ = ["DataSource", "build_files", "write_files"]


@dataclass(frozen=True, slots=True)
class DataSource:
    """The ClickHouse that Grafana reads. The password never enters a file: Grafana takes it from its own environment
    variable `password_variable`."""

    url: str
    database: str
    user: str
    password_variable: str = "GPULEDGER_CLICKHOUSE_PASSWORD"
    name: str = "GPULedger"
    uid: str = "gpuledger"


def _data_source_yaml(source: DataSource) -> str:
    parts = urlsplit(source.url)
    secure = parts.scheme == "https"
    document = {
        "apiVersion": 1,
        "datasources": [
            {
                "name": source.name,
                "uid": source.uid,
                "type": DATA_SOURCE_TYPE,
                "access": "proxy",
                "isDefault": False,
                "editable": False,
                "jsonData": {
                    "host": parts.hostname,
                    "port": parts.port or (8443 if secure else 8123),
                    "protocol": "http",
                    "secure": secure,
                    "username": source.user,
                    "defaultDatabase": source.database,
                    "tlsSkipVerify": False,
                },
                "secureJsonData": {"password": f"${source.password_variable}"},
            }
        ],
    }
    return yaml.safe_dump(document, sort_keys=False)


def _folder_yaml(path: str) -> str:
    document = {
        "apiVersion": 1,
        "providers": [
            {
                "name": "gpuledger",
                "folder": "GPULedger",
                "type": "file",
                "disableDeletion": False,
                "allowUiUpdates": False,
                "updateIntervalSeconds": 30,
                "options": {"path": path},
            }
        ],
    }
    return yaml.safe_dump(document, sort_keys=False)


def build_files(
    boards: Iterable[Board],
    source: DataSource,
    currency: str = "",
    path: str = "/etc/grafana/provisioning/dashboards/json",
) -> dict[str, str]:
    """Text by relative path. `path` is where Grafana will see the dashboards' folder. Same input, same bytes."""
    files = {
        "datasources/gpuledger.yaml": _data_source_yaml(source),
        "dashboards/gpuledger.yaml": _folder_yaml(path),
    }
    for board in boards:
        text = json.dumps(dashboard(board, currency), indent=2, ensure_ascii=False)
        files[f"dashboards/json/gpuledger-{board.id}.json"] = text + "\n"
    return files


def write_files(files: dict[str, str], out: Path) -> list[Path]:
    """Writes them below `out`, which is made; files of other names there stay as they are. Raises OSError."""
    written: list[Path] = []
    for name, text in sorted(files.items()):
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        written.append(target)
    return written
