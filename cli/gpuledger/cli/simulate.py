"""`gpuledger simulate`: publishes the events of a simulated fleet."""

from __future__ import annotations

import asyncio
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from gpuledger.agents.broker_topics import create_topics
from gpuledger.agents.publisher import Publisher
from gpuledger.agents.simulator.runner import STATE_FILE, Progress, run_simulation
from gpuledger.agents.simulator.scenario import Scenario, demo_scenario_path, load_scenario
from gpuledger.cli.durations import DURATION_MS
from gpuledger.cli.session import Session, pass_session
from gpuledger.schemas.config import Kafka

__all__ = ["simulate"]


@click.command()
@click.argument("scenario_path", metavar="[SCENARIO]", required=False, type=click.Path(path_type=Path))
@click.option("--for", "for_ms", type=DURATION_MS, help="End after this long, e.g. 90s; without it: on SIGTERM.")
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), help="Directory in which the site goes on next time."
)
@click.option("--seed", type=click.IntRange(min=0), help="Instead of the scenario's seed.")
@click.option("--speed", type=click.IntRange(1, 100_000), help="Instead of the scenario's speed.")
@click.option("--check", is_flag=True, help="Only read the scenario and say what is in it.")
@pass_session
def simulate(
    session: Session,
    scenario_path: Path | None,
    for_ms: int | None,
    data: Path | None,
    seed: int | None,
    speed: int | None,
    check: bool,
) -> None:
    """Publish the events of a simulated fleet: the built-in demo, or the one of SCENARIO (YAML).

    The same scenario, seed and start give the same events. With --data the site goes on where it stopped.
    """
    scenario = load_scenario(scenario_path or demo_scenario_path())
    changes = {name: value for name, value in (("seed", seed), ("speed", speed)) if value is not None}
    scenario = msgspec.structs.replace(scenario, **changes)
    click.echo(
        f"{scenario.name}: {scenario.gpus} GPUs in {len(scenario.pools)} pools, {len(scenario.tenants)} tenants, "
        f"seed {scenario.seed}, a sample per GPU every {scenario.period_ms} ms"
    )
    if check:
        return
    session.start_logging()
    if data is not None:
        data.mkdir(parents=True, exist_ok=True)
    asyncio.run(_run(session.config.kafka, scenario, for_ms, data / STATE_FILE if data is not None else None))


async def _run(kafka: Kafka, scenario: Scenario, for_ms: int | None, state_path: Path | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    last = Progress(0, 0, 0, 0)

    def remember(progress: Progress) -> None:
        nonlocal last
        if sys.stderr.isatty() and progress.event_ms // 1000 != last.event_ms // 1000:
            click.echo(f"\r{_line(progress)}", err=True, nl=False)
        last = progress

    await create_topics(kafka)
    async with Publisher(kafka, "gpuledger-simulator") as publisher:
        await run_simulation(scenario, publisher, stop, state_path=state_path, for_ms=for_ms, on_progress=remember)
    click.echo(_line(last))


def _line(progress: Progress) -> str:
    moment = datetime.fromtimestamp(progress.event_ms / 1000, UTC)
    return (
        f"{moment:%Y-%m-%d %H:%M:%S} UTC, {progress.messages} messages, {progress.bytes / 1e6:.1f} MB before "
        f"compression, {max(0, progress.behind_ms)} ms behind"
    )
