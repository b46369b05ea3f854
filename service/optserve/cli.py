"""The program ``optserve``: its commands, none of which loads torch before it must."""

from __future__ import annotations

import importlib.metadata
import platform

import typer

from optserve import __version__
from optserve.commands import sessions
from optserve.commands.config import config
from optserve.commands.fsck import fsck
from optserve.commands.health import health
from optserve.commands.serve import serve, variables_only

app = typer.Typer(
    name="optserve",
    help="Optimization as a service: post gradients, get parameters back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def version() -> None:
    """Print the versions of optserve, torch and Python."""
    torch = importlib.metadata.version("torch")
    typer.echo(f"optserve {__version__} (torch {torch}, Python {platform.python_version()})")


app.command(epilog=variables_only())(serve)
app.command()(health)
app.command()(config)
app.command()(fsck)
app.add_typer(sessions.app, name="sessions")
