"""dodgeburn slider: Concept Sliders made, measured and put together; each of its verbs is a module beside this one."""

from __future__ import annotations

import difflib

from dodgeburn.cli import (
    slider_calibrate,
    slider_compose,
    slider_evaluate,
    slider_sweep,
    slider_train,
    slider_unmix,
)
from dodgeburn.errors import UserError

HELP = "Concept Sliders: train, look at, calibrate and measure them, put them together, take them apart"
# Each has HELP, EXAMPLE and main(args), and imports what is heavy inside functions.
MODULES = {
    "train": slider_train, "sweep": slider_sweep, "calibrate": slider_calibrate, "evaluate": slider_evaluate,
    "compose": slider_compose, "unmix": slider_unmix,
}  # fmt: skip
EXAMPLES = {verb: module.EXAMPLE for verb, module in MODULES.items()}


def main(args: list[str]) -> int:
    """Run `dodgeburn slider VERB ...`; raises UserError for bad input."""
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    verb = args[0]
    if verb not in MODULES:
        near = difflib.get_close_matches(verb, MODULES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no verb 'slider {verb}': {hint}known: {', '.join(MODULES)}")
    return MODULES[verb].main(args[1:])


def _help() -> str:
    lines = ["usage: dodgeburn slider VERB [options]", ""]
    lines += [f"  {verb:<10} {module.HELP}" for verb, module in MODULES.items()]
    lines += ["", *(f"example: {example}" for example in EXAMPLES.values())]
    return "\n".join([*lines, "", "`dodgeburn slider VERB --help` explains a verb."])
