"""`python -m dodgeburn` is the same as the `dodgeburn` command."""

from dodgeburn.cli.main import run

run()
