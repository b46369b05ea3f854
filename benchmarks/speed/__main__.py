"""scripts/bench speed: measures a step in every way that there is, and writes it down.

With --only or --sizes it measures a part of that, and only prints.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.speed import environment, report
from benchmarks.speed.contestants import CONTESTANTS, SETS, rig
from benchmarks.speed.json_lists import json_lists
from benchmarks.speed.latency import QUICK, ROUNDS, measure
from benchmarks.speed.link import link
from benchmarks.speed.memory import memory
from benchmarks.speed.process import peers_python
from benchmarks.speed.progress import say
from benchmarks.speed.resident import resident
from benchmarks.speed.throughput import small, throughput
from tests.serving import ROOT

#: What --only takes beside the sets of contestants, in the order in which it runs.
PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "memory": memory,
    "small": small,
    "throughput": throughput,
    "resident": resident,
    "json": json_lists,
    "link": link,
}
QUICK_SIZES = ["10", "100k", "1M"]
HERE = results.PATH.parent
CHART = HERE / "speed.svg"
RAW = HERE / "speed.json"


def latency(directory: Path, sizes: list[str], workers: set[str], quick: bool) -> dict[str, Any]:
    """Return what :func:`measure` does, by size, and who did not take part."""
    chosen = [one for one in CONTESTANTS if one.worker in workers]
    with rig(directory) as made:
        if shutil.which("curl") is None:
            made.absent["optserve.curl"] = "curl is not installed"
            chosen = [one for one in chosen if one.key not in made.absent]
        measured = {size: measure(made, size, chosen, quick) for size in sizes}
        return {"sizes": measured, "absent": made.absent}


def run(only: set[str], sizes: list[str], quick: bool) -> dict[str, Any]:
    """Return the raw figures of the sets and parts in ``only``."""
    raw: dict[str, Any] = {}
    workers: set[str] = set().union(*(SETS[name] for name in only & SETS.keys()))
    parts = [part for part in PARTS if part in only]
    with tempfile.TemporaryDirectory(dir=HERE) as name:
        if workers:
            say(f"latency begins, then {', '.join(parts) or 'nothing more'}")
            raw["latency"] = latency(Path(name) / "latency", sizes, workers, quick)
        for number, part in enumerate(parts, 1):
            say(f"{part} begins, part {number} of {len(parts)}")
            raw[part] = PARTS[part](Path(name) / part, quick)
    return raw


def draw(raw: Path, out: Path) -> None:
    """Have the peers' environment draw the chart."""
    command = [str(peers_python()), "-m", "benchmarks.speed.chart", str(raw), str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)


def main() -> None:
    # So that everything that was started is also stopped.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options = _options()
    only = set(options.only or [*SETS, *PARTS])
    ready = peers_python().exists()
    if not options.quick and only & {"peers", "memory"}:
        ready = environment.ensure()
    if options.quick and not ready and not options.only:
        only.discard("peers")
    raw = run(only, options.sizes, options.quick)
    writes = options.whole and not options.quick and not options.dry
    # A miniature has other sizes than the targets.
    text = report.text(raw, judged=not options.quick, chart=writes and ready)
    print(text)
    if options.json is not None:
        options.json.write_text(json.dumps(raw) + "\n")
    if not writes:
        return
    RAW.write_text(json.dumps(raw) + "\n")
    if ready:
        draw(RAW, CHART)
    command = shlex.join(["scripts/bench", "speed", *sys.argv[1:]])
    results.write("Speed", command, text)


def _options() -> argparse.Namespace:
    def some(known: list[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := set(names) - set(known):
                raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(known)}")
            return names

        return parse

    parser = argparse.ArgumentParser(prog="scripts/bench speed", description=__doc__)
    parts = [*SETS, *PARTS]
    parser.add_argument("--only", type=some(parts), help=f"comma-separated: {', '.join(parts)}")
    parser.add_argument("--sizes", type=some([*ROUNDS]), help=f"of: {', '.join(ROUNDS)}")
    parser.add_argument("--quick", action="store_true", help="a miniature; writes no results")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the raw figures here")
    options = parser.parse_args()
    options.whole = not (options.only or options.sizes)
    options.sizes = options.sizes or (QUICK_SIZES if options.quick else [*ROUNDS])
    if options.quick and (unknown := set(options.sizes) - QUICK.keys()):
        parser.error(f"--quick has no size {min(unknown)}")
    return options


if __name__ == "__main__":
    main()
