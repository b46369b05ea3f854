"""``optserve fsck``: reads everything that is stored, says what is damaged, salvages when told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optserve.commands.opened import opened
from optserve.commands.options import fail, flag, read_settings
from optserve.commands.progress import Progress
from optserve.settings import StoreSettings
from optserve_client.errors import OptserveError

if TYPE_CHECKING:
    from optserve.sessions.salvage import Plan
    from optserve.store import Store
    from optserve.store.base import SessionRow
    from optserve.store.check import Problem, Tally

#: Exit status.
CLEAN, DAMAGED, CANNOT_OPEN = 0, 1, 2
_FROM_BACKUP = (
    "export what can be read (optserve sessions export) and begin a new database, "
    "or go back to a backup"
)

Json = dict[str, Any]


@dataclass(slots=True)
class Report:
    """What was found."""

    place: str
    tally: Tally
    problems: list[Json] = field(default_factory=list)
    #: Sessions whose last acknowledged events may be gone; they say so by themselves.
    suspect: list[str] = field(default_factory=list)
    salvaged: list[Json] = field(default_factory=list)
    #: Problems that are no longer there.
    cured: int = 0

    @property
    def status(self) -> int:
        return DAMAGED if len(self.problems) > self.cured else CLEAN

    @property
    def summary(self) -> str:
        seen = self.tally
        found, cured = len(self.problems), f", {self.cured} of them gone now" if self.cured else ""
        return (
            f"{_count(seen.sessions, 'session')}, {_count(seen.events, 'event')}, "
            f"{_count(seen.snapshots, 'snapshot')}, {_count(seen.payloads, 'payload')} of "
            f"{_count(seen.payload_bytes, 'byte')} in {self.place}: "
            + (f"{_count(found, 'problem')}{cured}" if found else "clean")
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def fsck(
    data_dir: Annotated[str | None, flag("data_dir")] = None,
    store: Annotated[str | None, flag("store")] = None,
    files: Annotated[str | None, flag("files")] = None,
    salvage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID|all",
            help="Check this session only and, if it is damaged, go back to the last version that "
            "can be rebuilt. What came after it is deleted, and named. Repeatable; all: whatever "
            "is damaged.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Read everything that is stored and say what is damaged. No server may run on it.

    Exit status: 0 nothing is damaged, 1 something is, 2 it cannot be opened.
    """
    places = {"data_dir": data_dir, "store": store, "files": files}
    settings = read_settings(StoreSettings, places)
    with opened(settings, CANNOT_OPEN) as kept:
        try:
            report = _Run(kept, settings.place, as_json).check(salvage or [])
        except OptserveError as exc:  # not one session, but all
            fail(exc.detail, CANNOT_OPEN, exc)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "summary": report.summary}, indent=2))
    else:
        typer.echo(report.summary)
    raise typer.Exit(report.status)


class _Run:
    """One check of one store, with a line for each thing that it finds."""

    def __init__(self, store: Store, place: str, quiet: bool) -> None:
        from optserve.store.check import Tally

        self._store = store
        self._report = Report(place, Tally())
        self._progress = Progress()
        self._quiet = quiet

    def check(self, salvage: Sequence[str]) -> Report:
        """Check all sessions, or those to salvage; salvage them if they are damaged."""
        sessions = self._store.sessions()
        chosen = [name for name in salvage if name != "all"]
        if unknown := set(chosen) - {row.key.session for row in sessions}:
            fail(f"no session {min(unknown)!r} in {self._report.place}", CANNOT_OPEN)
        if chosen and "all" not in salvage:
            sessions = [row for row in sessions if row.key.session in chosen]
        else:
            self._check_medium()
        with self._progress:
            for number, row in enumerate(sessions):
                self._progress.show(f"{number + 1} of {len(sessions)}: {row.key.session}")
                self._check_session(row, bool(salvage))
        return self._report

    def _check_medium(self) -> None:
        from optserve.store.check import SelfChecking

        if isinstance(self._store, SelfChecking):
            for what in self._store.integrity():
                self._found(
                    {"session": None, "lsn": None, "file": None, "problem": what}, _FROM_BACKUP
                )

    def _check_session(self, row: SessionRow, salvage: bool) -> None:
        from optserve.sessions.salvage import plan
        from optserve.store.check import check_session

        name = row.key.session
        problems = list(check_session(self._store, row, self._report.tally))
        if problems:
            way = plan(self._store, row)
            for problem in problems:
                self._found(_row(problem), _cure(name, way))
            if salvage:
                self._salvage(row, way, len(problems))
        elif salvage:
            self._say(f"{name}: nothing is damaged, nothing was changed")
        if row.suspect and not problems:
            self._report.suspect.append(name)
            self._say(
                f"{name}: the last events before a crash may be gone; "
                "it begins a new generation at its next use, and clients are told"
            )

    def _salvage(self, row: SessionRow, way: Plan | None, problems: int) -> None:
        from optserve.sessions.salvage import salvage
        from optserve.store.check import Tally, check_session

        name = row.key.session
        if way is None or not way.lost_events:
            self._say(f"{name}: nothing was changed; {_cure(name, way)}")
            return
        generation = salvage(self._store, way)
        after = self._store.session(row.key)
        assert after is not None
        left = sum(1 for _ in check_session(self._store, after, Tally()))
        self._report.cured += problems - left
        self._report.salvaged.append(
            {
                "session": name,
                "version": way.version,
                "generation": generation,
                "lost_versions": way.lost_versions,
                "lost_events": way.lost_events,
            }
        )
        self._say(
            f"{name}: salvaged; it is back at version {way.version}, in the new generation "
            f"{generation}; lost: {way.loss}"
        )

    def _found(self, problem: Json, cure: str) -> None:
        self._report.problems.append({**problem, "cure": cure})
        name = problem["session"] or self._report.place
        at = "" if problem["lsn"] is None else f"lsn {problem['lsn']}: "
        self._say(f"{name}: {at}{problem['problem']}; {cure}")

    def _say(self, line: str) -> None:
        if not self._quiet:
            self._progress.clear()
            typer.echo(line)


def _row(problem: Problem) -> Json:
    return {
        "session": problem.key.session if problem.key else None,
        "lsn": problem.lsn,
        "file": problem.file,
        "problem": problem.what,
    }


def _cure(name: str, way: Plan | None) -> str:
    if way is None:
        return f"nothing of it can be rebuilt, `optserve sessions rm {name}` removes it"
    if not way.lost_events:
        return "no event is lost, the session is rebuilt without it"
    return (
        f"`optserve fsck --salvage {name}` goes back to version {way.version} and loses {way.loss}"
    )
