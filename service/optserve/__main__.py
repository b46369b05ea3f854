"""``python -m optserve`` is the program ``optserve``."""

from optserve.cli import main

if __name__ == "__main__":
    main()
