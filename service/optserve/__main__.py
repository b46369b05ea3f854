"""The program ``optserve``, also as ``python -m optserve``."""

import sys


def main() -> None:
    """Run the command that is asked for."""
    if sys.argv[1:2] == ["health"]:  # every few seconds, in a container: it loads little
        from optserve.commands.health import app

        app(sys.argv[2:], prog_name="optserve health")
        return
    from optserve import logs
    from optserve.cli import app

    logs.configure("warning")  # serve has a level of its own
    app()


if __name__ == "__main__":
    main()
