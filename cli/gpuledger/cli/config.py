"""`gpuledger config`: is the configuration right, and what is it?"""

from __future__ import annotations

import json
from typing import Any, Literal

import click
import yaml

from gpuledger.cli.session import Session, pass_session

__all__ = ["config"]


@click.group()
def config() -> None:
    """Check or show the configuration."""


@config.command()
@pass_session
def check(session: Session) -> None:
    """Read the file, the GPULEDGER_… variables and the secrets' files; name every setting that is wrong.

    Exit status 0 when all is right, 2 otherwise.
    """
    source = session.config_path if session.config_path is not None else "no file, only defaults and variables"
    _ = session.config
    click.echo(f"ok: {source}")


@config.command()
@click.option("--format", "layout", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@click.option("--defaults", is_flag=True, help="Every setting with its default, its type and what it means.")
@pass_session
def show(session: Session, layout: Literal["yaml", "json"], defaults: bool) -> None:
    """Print what holds, from file and variables together. Secrets are shown as ***."""
    from gpuledger.schemas.config import Config
    from gpuledger.schemas.settings import describe, to_builtins

    if defaults:
        rows = [
            {"setting": s.path, "default": s.default, "type": s.type, "secret": s.secret, "meaning": s.doc}
            for s in describe(Config)
        ]
        _print(rows, layout)
    else:
        _print(to_builtins(session.config), layout)


def _print(value: Any, layout: Literal["yaml", "json"]) -> None:
    if layout == "json":
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        click.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120), nl=False)
