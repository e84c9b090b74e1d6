"""Imports that are put off: not made by loading a model, and whole when they are used."""

import subprocess
import sys

LOAD = """
import sys
from dodgeburn.cli.spared import spare_imports
spare_imports()
import dodgeburn.models.loading, dodgeburn.sampling.loop, dodgeburn.slide.train
heavy = ["scipy.stats._stats_py", "scipy.optimize._minimize", "scipy.integrate._ode", "peft.tuners"]
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", LOAD + code], check=True)


def test_loading_a_model_s_code_leaves_them_out_and_using_them_brings_them() -> None:
    run("""
assert not [name for name in heavy if name in sys.modules]
import transformers.loss.loss_for_object_detection as loss
assert loss.linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
from scipy.stats import rankdata
import scipy.stats, scipy.integrate
assert rankdata([3, 1, 2]).tolist() == [3, 1, 2] and scipy.stats.norm.cdf(0) == 0.5
assert scipy.integrate.quad(lambda x: x, 0, 1)[0] == 0.5
from scipy.optimize import minimize_scalar
assert abs(minimize_scalar(lambda x: (x - 2) ** 2).x - 2) < 1e-6
from dodgeburn.slide.evaluate import evaluate
""")


def test_what_is_loaded_already_stays() -> None:
    code = "import sys, scipy.stats as was\nfrom dodgeburn.cli.spared import spare_imports\nspare_imports()\n"
    subprocess.run([sys.executable, "-c", code + "assert sys.modules['scipy.stats'] is was"], check=True)
