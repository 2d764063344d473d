"""What every command gets: the global options, and the configuration read when first asked for.

Reading late keeps `gpuledger --help` and `gpuledger config check` working with a broken file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from gpuledger.cli.logs import set_up_logs

if TYPE_CHECKING:
    from gpuledger.schemas.config import Config, Log

__all__ = ["Session", "pass_session"]


@dataclass
class Session:
    """One invocation. `log_level` overrides the configuration's; `environ` is where variables are looked up."""

    config_path: Path | None = None
    log_level: str | None = None
    debug: bool = False
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @cached_property
    def config(self) -> Config:
        """The configuration, read once. Raises ConfigError."""
        # Here and not above: a command that needs no configuration starts without reading its model.
        from gpuledger.schemas.config import load_config

        config = load_config(self.config_path, self.environ)
        if self.log_level is None:
            return config
        return msgspec.structs.replace(config, log=msgspec.structs.replace(config.log, level=self.log_level))

    def start_logging(self) -> None:
        """Log as configured. For processes that keep running; other commands only print warnings, as text."""
        log: Log = self.config.log
        set_up_logs(log.level, log.format)

    def start_quiet_logging(self) -> None:
        """What holds until `start_logging`: text, and warnings only where the command line says nothing else."""
        set_up_logs(self.log_level or "warning", "text")


pass_session = click.make_pass_decorator(Session, ensure=True)
