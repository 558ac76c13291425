"""`python -m vivace`: the command line."""

from vivace.cli import main

main()
