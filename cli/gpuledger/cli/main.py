"""The one command `gpuledger`. A sub-command's module is imported only when it is called: a node agent has no Faust and
no chDB, and still gets the whole list from `gpuledger --help`.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import IO, Any

import click

from gpuledger.cli.exceptions import CommandError, MissingExtra
from gpuledger.cli.session import Session
from gpuledger.schemas.exceptions import GPULedgerError

__all__ = ["COMMANDS", "LazyCommand", "cli", "main"]


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """`target` is ``module:attribute``, `extra` the packages it needs beyond the core ("" for none)."""

    target: str
    extra: str
    help: str


#: In the order of `gpuledger --help`: run it, feed it, read it, look after it.
COMMANDS: dict[str, LazyCommand] = {
    "up": LazyCommand("gpuledger.cli.up:up", "local", "Run the whole product on this machine, with a demo fleet."),
    "agent": LazyCommand("gpuledger.cli.agent:agent", "agent", "Send this node's telemetry and allocations."),
    "worker": LazyCommand("gpuledger.cli.worker:worker", "streams", "Turn events into fragments, ledger and money."),
    "serve": LazyCommand("gpuledger.cli.serve:serve", "dashboards", "Serve the built-in page."),
    "simulate": LazyCommand("gpuledger.cli.simulate:simulate", "streams", "Publish the events of a simulated fleet."),
    "replay": LazyCommand("gpuledger.cli.replay:replay", "streams", "Publish a real cluster trace."),
    "rates": LazyCommand("gpuledger.cli.documents:rates", "streams", "Apply or list asset costs, tariffs, rate cards."),
    "capacity": LazyCommand("gpuledger.cli.documents:capacity", "streams", "Apply or list commitments and transfers."),
    "tenants": LazyCommand("gpuledger.cli.documents:tenants", "streams", "Apply or list tenants and the account map."),
    "cost": LazyCommand("gpuledger.cli.cost:cost", "streams", "Cost by tenant, pool or job."),
    "ledger": LazyCommand("gpuledger.cli.ledger:ledger", "streams", "Show or recompute the ledger of a range."),
    "audit": LazyCommand("gpuledger.cli.audit:audit", "streams", "Prove that every GPU-second is accounted once."),
    "status": LazyCommand("gpuledger.cli.status:status", "streams", "Lag, freshness, frontier, spool, dead letters."),
    "deadletter": LazyCommand(
        "gpuledger.cli.deadletter:deadletter", "streams", "List, show or send again what could not be read."
    ),
    "dashboards": LazyCommand("gpuledger.cli.dashboards:dashboards", "dashboards", "Build the Grafana dashboards."),
    "db": LazyCommand("gpuledger.cli.db:db", "streams", "Bring the database up to date, or show its state."),
    "config": LazyCommand("gpuledger.cli.config:config", "", "Check or show the configuration."),
}


class _Shown(click.ClickException):
    """An error a user reads: ``error: …`` on standard error and exit status 2, no traceback."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file or sys.stderr)


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        try:
            return _load(cmd_name, entry)
        except GPULedgerError as error:
            raise _Shown(str(error)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list from the table: importing every command to ask for its help would need every extra."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            guess = _closest(args[0])
            raise click.UsageError(f"{error.message}{guess}", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (GPULedgerError, ModuleNotFoundError) as error:
            session = ctx.find_object(Session)
            if session is not None and session.debug:
                traceback.print_exc()
            raise _Shown(_text(error, ctx)) from error


def _closest(name: str) -> str:
    from difflib import get_close_matches

    guess = get_close_matches(name, COMMANDS, n=1)
    return f" Did you mean {guess[0]}?" if guess else ""


def _load(name: str, entry: LazyCommand) -> click.Command:
    module, _, attribute = entry.target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise _missing(name, entry, error) from error


def _missing(name: str, entry: LazyCommand, error: ModuleNotFoundError) -> CommandError:
    """What to install. One of our own modules that is absent is a broken installation, not an absent extra."""
    absent = error.name or str(error)
    if absent.split(".")[0] == "gpuledger" or not entry.extra:
        return CommandError(f"gpuledger {name}: {absent} is not part of this installation; install GPULedger again")
    return MissingExtra(name, entry.extra, absent)


def _text(error: GPULedgerError | ModuleNotFoundError, ctx: click.Context) -> str:
    if isinstance(error, GPULedgerError):
        return str(error)
    name = ctx.invoked_subcommand or ""
    entry = COMMANDS.get(name)
    return str(_missing(name, entry, error)) if entry is not None else str(error)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="GPULEDGER_CONFIG",
    show_envvar=True,
    metavar="FILE",
    help="Configuration in YAML; without it the defaults and GPULEDGER_… variables hold.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Least level that is logged; overrides log.level.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(metadata.version("gpuledger"), prog_name="gpuledger")
@click.pass_context
def cli(ctx: click.Context, config_path: Path | None, log_level: str | None, debug: bool) -> None:
    """Every GPU-second of a fleet accounted exactly once: who held it, what it did, what it cost, and where capacity
    moved."""
    session = Session(config_path, log_level, debug)
    session.start_quiet_logging()
    ctx.obj = session


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="gpuledger")
