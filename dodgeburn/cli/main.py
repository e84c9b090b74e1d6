"""`dodgeburn VERB ...`: finds the verb, runs it, turns trouble into one line and an exit code."""

from __future__ import annotations

import ast
import os
import sys
from importlib import import_module
from pathlib import Path

from dodgeburn import __version__
from dodgeburn.cli.spared import spare_imports
from dodgeburn.errors import UserError, did_you_mean

# Verbs in the order in which a newcomer meets them; each is a module of this package.
VERBS = (
    "tour", "generate", "merge", "compare", "bake", "delta", "slider", "artifacts", "dpo", "bias", "deconstruct",
    "inspect", "diff", "verify", "convert", "card", "pocket",
)  # fmt: skip
RESUMED = ("compare", "slider", "artifacts", "dpo", "bias", "deconstruct", "pocket", "tour")
"""Verbs that go on where they were interrupted; the others begin anew."""
INTRO = "dodgeburn edits text-to-image diffusion models in weight space and measures what each edit did."
EXAMPLE = 'dodgeburn generate "a doctor, smiling broadly, with red hair" --model pocket --seed 0 -n 8'


def run() -> None:
    """Entry point of the `dodgeburn` command."""
    spare_imports()  # here and not in `main`, which others call within processes of their own
    sys.exit(main(sys.argv[1:]))


def main(args: list[str]) -> int:
    """Run one command line and return its exit code: 0 done, 2 bad input, 130 interrupted."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"dodgeburn {__version__}")
        return 0
    verb = args[0]
    try:
        if verb not in VERBS:
            hint = did_you_mean(verb, VERBS, cutoff=0.4)
            raise UserError(f"no verb '{verb}': {hint}known verbs: {', '.join(VERBS)}")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        return int(import_module(f"dodgeburn.cli.{verb}").main(args[1:]))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        again = "what is finished stays, nothing half-written"
        if verb in RESUMED:
            again = "run the same command again to go on"
        elif verb == "generate" and not {arg.partition("=")[0] for arg in args} & {"--best-of", "--foresee"}:
            again = "what is finished stays; with --resume the same command makes the rest"
        print(f"interrupted: {again}", file=sys.stderr)
        return 130
    except OSError as error:
        # A disk that is full or a folder that cannot be written, wherever it shows.
        name = f"{error.filename}: " if error.filename else "a file cannot be read or written: "
        print(f"error: {name}{error.strerror or error}", file=sys.stderr)
        return 2


def _help() -> str:
    lines = [INTRO, "", "usage: dodgeburn VERB [options]", ""]
    lines += [f"  {verb:<11} {_summary(verb)}" for verb in VERBS]
    lines += ["", f"example: {EXAMPLE}", "", "`dodgeburn VERB --help` explains a verb and shows an example."]
    return "\n".join(lines)


def _summary(verb: str) -> str:
    """A verb's HELP line, read from its source: importing seven modules would cost the help its half second."""
    tree = ast.parse((Path(__file__).parent / f"{verb}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "HELP":
            return str(ast.literal_eval(node.value))
    return ""
