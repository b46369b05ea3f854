"""``optserve sessions``: list, show, export, import and remove, with a server or without."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from optserve.commands import state_file, table
from optserve.commands.opened import opened
from optserve.commands.options import fail, flag, read_settings, say
from optserve.commands.shelf import Offline, Shelf, connected
from optserve.settings import StoreSettings
from optserve_client import wire
from optserve_client.errors import OptserveError

app = typer.Typer(no_args_is_help=True)

#: Exit status where something was refused or failed.
FAILED = 1
_ASK_IT = "or ask it: --url http://HOST:PORT"

Id = Annotated[str, typer.Argument(metavar="ID", help="Of the session.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        show_default=False,
        help="Ask the server at http://HOST:PORT or unix:/PATH, also OPTSERVE_URL; without it, "
        "the database is opened, which no server may have open.",
    ),
]
DataDir = Annotated[str | None, flag("data_dir")]
StoreUrl = Annotated[str | None, flag("store")]
Files = Annotated[str | None, flag("files")]


@contextmanager
def _shelf(
    url: str | None, data_dir: str | None, store: str | None, files: str | None
) -> Iterator[Shelf]:
    """Yield the sessions that the flags name; exits with one sentence where something fails."""
    places = {"data_dir": data_dir, "store": store, "files": files}
    named = [f"--{name.replace('_', '-')}" for name, value in places.items() if value is not None]
    if url and named:
        fail(f"--url and {named[0]} are two places to look for sessions, expected one", 2)
    url = url or (None if named else os.environ.get("OPTSERVE_URL") or None)
    try:
        if url:
            with connected(url) as remote:
                yield remote
        else:
            settings = read_settings(StoreSettings, places)
            with opened(settings, FAILED, _ASK_IT) as kept:
                yield Offline(kept)
    except OptserveError as exc:
        fail(exc.detail, FAILED, exc)
    except state_file.CannotFile as exc:
        fail(str(exc), FAILED, exc)


def _check_id(session_id: str) -> None:
    try:
        wire.check_id("session id", session_id)
    except OptserveError as exc:
        fail(exc.detail, 2, exc)


@app.callback()
def sessions() -> None:
    """List, show, export, import and remove sessions, with a server or without.

    Exit status: 0 done, 1 refused or failed, 2 a flag has a value that cannot be used.
    """


@app.command("ls")
def list_sessions(
    as_json: AsJson = False,
    url: Url = None,
    data_dir: DataDir = None,
    store: StoreUrl = None,
    files: Files = None,
) -> None:
    """List all sessions: a table on a terminal, tab-separated in a pipe."""
    with _shelf(url, data_dir, store, files) as shelf:
        rows = shelf.rows()
    if as_json:
        _print_json(rows)
        return
    for line in table.lines(rows, sys.stdout.isatty()):
        typer.echo(line)


@app.command()
def show(
    session_id: Id,
    url: Url = None,
    data_dir: DataDir = None,
    store: StoreUrl = None,
    files: Files = None,
) -> None:
    """Print what is known of a session, as JSON: from a server everything but its tensors."""
    _check_id(session_id)
    with _shelf(url, data_dir, store, files) as shelf:
        _print_json(shelf.show(session_id))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@app.command("export")
def export_session(
    session_id: Id,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to; - is stdout.")],
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    url: Url = None,
    data_dir: DataDir = None,
    store: StoreUrl = None,
    files: Files = None,
) -> None:
    """Write everything of a session to a safetensors file."""
    _check_id(session_id)
    with _shelf(url, data_dir, store, files) as shelf:
        state_file.check_target(file, force)
        written = state_file.write(file, shelf.export(session_id), force)
    if file != "-":
        say(f"{session_id}: {written} bytes in {file}")


@app.command("import")
def import_session(
    file: Annotated[str, typer.Argument(metavar="FILE", help="From where; - is stdin.")],
    session_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Of the session; unset, a new one.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace everything in the session of this id."),
    ] = False,
    url: Url = None,
    data_dir: DataDir = None,
    store: StoreUrl = None,
    files: Files = None,
) -> None:
    """Create a session from an exported file and print its id."""
    if session_id is not None:
        _check_id(session_id)
    with _shelf(url, data_dir, store, files) as shelf:
        typer.echo(shelf.load(state_file.read(file), session_id, force))


@app.command("rm")
def remove(
    session_ids: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Of the sessions.", show_default=False)
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = None,
    data_dir: DataDir = None,
    store: StoreUrl = None,
    files: Files = None,
) -> None:
    """Delete sessions, with their history. Asks first; in a pipe it wants --yes."""
    for session_id in session_ids:
        _check_id(session_id)
    if not yes:
        _ask(session_ids)
    with _shelf(url, data_dir, store, files) as shelf:
        failed = [name for name in session_ids if not _removed(shelf.remove, name)]
    raise typer.Exit(FAILED if failed else 0)


def _ask(session_ids: list[str]) -> None:
    if not sys.stdin.isatty():
        fail("nobody is there to be asked; --yes deletes without asking", 2)
    what = "this session" if len(session_ids) == 1 else f"these {len(session_ids)} sessions"
    typer.confirm(f"Delete {what} with all history: {' '.join(session_ids)}?", abort=True, err=True)


def _removed(remove_one: Callable[[str], None], session_id: str) -> bool:
    try:
        remove_one(session_id)
    except OptserveError as exc:
        say(f"{session_id}: {exc.detail}")
        return False
    typer.echo(session_id)
    return True
