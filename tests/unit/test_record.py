"""The figures that long tests leave behind."""

from __future__ import annotations

import datetime
import socket
from pathlib import Path
from types import SimpleNamespace

from tests import record


def test_figures_come_from_the_reports_of_passed_tests_in_their_order() -> None:
    reports = [
        SimpleNamespace(user_properties=[("figure", ("b", 2.0, "s")), ("other", 1)]),
        SimpleNamespace(user_properties=[("figure", ["a", 1.0, "ms"])]),
    ]
    failed = [SimpleNamespace(user_properties=[("figure", ("c", 3.0, "s"))])]
    found = record.collect({"passed": reports, "failed": failed})
    assert found == [("b", 2.0, "s"), ("a", 1.0, "ms")]


def test_a_run_appends_a_dated_table_and_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "track-record.md"
    path.write_text("# Track record\n")
    record.append(path, [("step, 25 M parameters", 105.25, "ms"), ("peak", 12345678, "bytes")])
    record.append(path, [("again", 1, "s")])
    text = path.read_text()
    assert text.startswith("# Track record\n\n## 20")
    assert "| step, 25 M parameters | 105 | ms |\n| peak | 12,345,678 | bytes |\n" in text
    assert text.endswith("| again | 1 | s |\n")
    assert text.count("\n## ") == 2


def test_a_section_names_the_machine_but_not_the_host() -> None:
    text = record.section([("x", 1, "s")], datetime.date(2026, 1, 2))
    assert "\n## 2026-01-02\n" in text
    assert " cores, " in text
    assert " GiB; Python 3." in text
    assert socket.gethostname() not in text
