"""dodgeburn artifacts: artifacts estimated early in denoising; each of its verbs is a module beside this one."""

from __future__ import annotations

from dodgeburn.cli import artifacts_collect, artifacts_evaluate, artifacts_label, artifacts_score, artifacts_train
from dodgeburn.cli.verbs import run_verb

HELP = "estimate artifacts early in denoising: collect and label trajectories, train, score and evaluate estimators"
# Each has HELP, EXAMPLE and main(args), and imports what is heavy inside functions.
MODULES = {
    "collect": artifacts_collect, "label": artifacts_label, "train": artifacts_train, "score": artifacts_score,
    "evaluate": artifacts_evaluate,
}  # fmt: skip
EXAMPLES = {verb: module.EXAMPLE for verb, module in MODULES.items()}


def main(args: list[str]) -> int:
    """Run `dodgeburn artifacts VERB ...`; raises UserError for bad input."""
    return run_verb("artifacts", MODULES, args)
