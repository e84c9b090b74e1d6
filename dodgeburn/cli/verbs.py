"""Verbs with verbs of their own (`dodgeburn slider train`): finds the one that is meant, prints their help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from dodgeburn.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Part:
    """A verb that is no module of its own, with what a verb's module has."""

    HELP: str  # one line
    EXAMPLE: str  # a command line
    main: Callable[[list[str]], int]  # told the arguments after its name


def run_verb(name: str, verbs: Mapping[str, ModuleType | Part], args: list[str]) -> int:
    """Run `dodgeburn NAME VERB ...`. Modules have HELP, EXAMPLE and main(args); raises UserError for bad input."""
    if not args or args[0] in ("-h", "--help", "--help-all"):
        print(_help(name, verbs))
        return 0
    verb = args[0]
    if verb not in verbs:
        hint = did_you_mean(verb, verbs, n=1, cutoff=0.4)
        raise UserError(f"no verb '{name} {verb}': {hint}known: {', '.join(verbs)}")
    return int(verbs[verb].main(args[1:]))


def _help(name: str, verbs: Mapping[str, ModuleType | Part]) -> str:
    width = max(map(len, verbs))
    lines = [f"usage: dodgeburn {name} VERB [options]", ""]
    lines += [f"  {verb:<{width}}  {one.HELP}" for verb, one in verbs.items()]
    lines += ["", *(f"example: {one.EXAMPLE}" for one in verbs.values())]
    return "\n".join([*lines, "", f"`dodgeburn {name} VERB --help` explains a verb."])
