"""`gpuledger agent`: the agent of a node, for ever or once."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import Any

import click
import msgspec

from gpuledger.agents.agent import Agent, agent_version, open_gpu_collectors
from gpuledger.agents.collectors.host import HostCollector
from gpuledger.agents.run import RunKeeper, SystemClock, read_boot_id
from gpuledger.cli.session import Session, pass_session
from gpuledger.schemas.config import Config
from gpuledger.schemas.settings import to_builtins

__all__ = ["agent"]


@click.group()
def agent() -> None:
    """Send this node's telemetry and allocations."""


def _with_options(config: Config, bootstrap: str | None, **settings: Any) -> Config:
    given = {name: value for name, value in settings.items() if value is not None}
    replace = msgspec.structs.replace
    config = replace(config, agent=replace(config.agent, **given))
    return config if bootstrap is None else replace(config, kafka=replace(config.kafka, bootstrap=bootstrap))


@agent.command()
@click.option("--bootstrap", metavar="HOST:PORT", help="Instead of kafka.bootstrap.")
@click.option("--node", help="Instead of agent.node.")
@click.option("--spool", "spool_dir", type=click.Path(file_okay=False), help="Instead of agent.spool_dir.")
@click.option("--listen", metavar="HOST:PORT", help="Instead of agent.listen; port 0 is a free one.")
@pass_session
def run(session: Session, bootstrap: str | None, node: str | None, spool_dir: str | None, listen: str | None) -> None:
    """Sample, spool and send until SIGTERM; then hand over what was seen and end within ten seconds."""
    config = _with_options(session.config, bootstrap, node=node, spool_dir=spool_dir, listen=listen)
    session.start_logging()
    status = 1
    try:
        asyncio.run(_run(config))
        status = 0
    finally:
        if status == 0:
            # A driver call that hangs sits in a thread that Python would wait for at its end.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


async def _run(config: Config) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await Agent(config).run(stop)


@agent.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@pass_session
def once(session: Session, as_json: bool) -> None:
    """Show what this node would send: its devices, one sample of each, and the host. Sends nothing."""
    settings = session.config.agent
    clock = SystemClock()
    run = RunKeeper(clock).run
    devices: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for collector in open_gpu_collectors(settings):
        versions.update(collector.versions())
        for info, row in zip(collector.devices(), collector.sample(), strict=True):
            devices.append({"gpu": info.gpu, "index": info.index, "model": info.model, "sample": dict(row)})
        collector.close()
    host = None
    if "host" in settings.collectors:
        host = to_builtins(HostCollector().read(run.ts_ms(clock.boottime_ms())))
    seen = {
        "agent_version": agent_version(),
        "boot_id": read_boot_id(),
        "devices": devices,
        "host": host,
        "versions": versions,
    }
    if as_json:
        click.echo(msgspec.json.encode(seen))
        return
    click.echo(f"{len(devices)} GPUs" + "".join(f", {name} {value}" for name, value in versions.items()))
    for device in devices:
        click.echo(f"{device['index']} {device['gpu']} {device['model']}")
        _echo_values(device["sample"])
    if host is not None:
        click.echo("host")
        _echo_values(host)


def _echo_values(values: dict[str, Any]) -> None:
    for name, value in values.items():
        click.echo(f"  {name} {'-' if value is None else value}")
