"""`gpuledger worker`: one Faust worker process."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from gpuledger.cli.session import Session, pass_session

__all__ = ["worker"]


@click.group()
def worker() -> None:
    """Store what arrives and keep the ledger."""


@worker.command()
@click.option("--listen", metavar="HOST:PORT", help="Instead of worker.listen; port 0 is a free one.")
@click.option(
    "--datadir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/tmp/gpuledger-worker"),
    show_default=True,
    help="Scratch directory of Faust; nothing is kept there.",
)
@pass_session
def run(session: Session, listen: str | None, datadir: Path) -> None:
    """Run until SIGTERM; then finish the block in flight within ten seconds."""
    # Here and not above: Faust takes a second to import, and `--help` should not.
    from gpuledger.streams.worker import run_worker

    config = session.config
    if listen is not None:
        config = msgspec.structs.replace(config, worker=msgspec.structs.replace(config.worker, listen=listen))
    session.start_logging()
    run_worker(config, datadir)
