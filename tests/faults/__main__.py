"""`scripts/faults`: kills, stops, cuts and full disks under load, and whether the ledger is the undisturbed one.

Exit status 0 when both ledgers are the same bit for bit, 1 when not.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from tests.faults.disks import private_mounts
from tests.faults.report import as_json, as_markdown
from tests.faults.run import run


@click.command()
@click.option("--kills", default=20, show_default=True, type=click.IntRange(1, 5000), help="Faults to inject.")
@click.option("--seed", default=1, show_default=True, type=int, help="The same seed draws the same load and faults.")
@click.option(
    "--report", type=click.Path(path_type=Path, file_okay=False), help="Folder for report.json and report.md."
)
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Empty folder for logs; kept.")
@click.option("--limit-s", type=click.IntRange(60), help="No more faults after that; default 600 + 20 per kill.")
@click.option("--no-mount", is_flag=True, help="Full disks by a limit of file size, as where mounting is not allowed.")
@click.option("--wrong", type=click.Choice(["commit-first", "late-version"]), help="A mistake that must be noticed.")
def main(
    kills: int,
    seed: int,
    report: Path | None,
    keep: Path | None,
    limit_s: int | None,
    no_mount: bool,
    wrong: str | None,
) -> None:
    """Run the load of 2,000 GPUs undisturbed and disturbed, and compare every view of the two ledgers."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    for noisy in ("gpuledger", "aiokafka", "clickhouse_connect", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    may_mount = not no_mount and private_mounts()
    # What was started ends with the blocks it was started in.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as stack:
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            directory = keep.absolute()
        else:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuledger-faults-")))
        outcome = run(kills, seed, directory, may_mount, wrong, limit_s or 600 + 20 * kills)
    page, data = as_markdown(outcome), json.dumps(as_json(outcome))
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        (report / "report.md").write_text(page)
        (report / "report.json").write_text(f"{data}\n")
    click.echo(page)
    click.echo(data)
    sys.exit(1 if outcome.problems else 0)


if __name__ == "__main__":
    main()
