"""Imports point downwards only, and the light parts stay light."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dodgeburn"
# From the ground up: a part may import itself and what stands before it.
ORDER = (
    "errors", "quiet", "given_settings", "prompt_file", "jobs", "pocket", "checkpoint", "images", "measure", "models",
    "sampling", "merge", "training", "slide", "rework", "rework.dpo", "rework.bias", "rework.deconstruct",
    "foresee", "tour", "cli",
)  # fmt: skip


def part_of(module: str) -> str:
    """The longest name in ORDER that the module is or lies in, or else its first part."""
    names = module.split(".")[1:]
    two = ".".join(names[:2])
    return two if two in ORDER else (names or [""])[0]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dodgeburn"):
            found.update(f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.startswith("dodgeburn"))
    return {part_of(name) for name in found} - {"", "__version__"}


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = part_of(".".join(("dodgeburn", *path.relative_to(PACKAGE).with_suffix("").parts)))
    assert own in ORDER, f"{own} has no place in the order"
    above = {name for name in imports(path) if ORDER.index(name) > ORDER.index(own)}
    assert not above, f"{path.name} imports from above: {above}"


def test_the_rule_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from dodgeburn.cli import main\n    import dodgeburn.merge.run\n")
    assert imports(bad) == {"cli", "merge"}
    bad.write_text("from dodgeburn.rework.bias.audit import audit\nfrom dodgeburn.rework import deconstruct\n")
    assert imports(bad) == {"rework.bias", "rework.deconstruct"}


LIGHT = (
    "dodgeburn", "dodgeburn.cli.main", "dodgeburn.cli.inspect", "dodgeburn.cli.generate", "dodgeburn.cli.merge",
    "dodgeburn.cli.compare", "dodgeburn.cli.pocket", "dodgeburn.cli.tour", "dodgeburn.images.png",
    "dodgeburn.merge.presets", "dodgeburn.merge.blocks", "dodgeburn.checkpoint.layout", "dodgeburn.pocket.captions",
    "dodgeburn.cli.bake", "dodgeburn.cli.delta", "dodgeburn.cli.convert", "dodgeburn.checkpoint.lora_inspect",
    "dodgeburn.cli.diff", "dodgeburn.merge.diff",
    "dodgeburn.cli.slider", "dodgeburn.cli.dpo", "dodgeburn.checkpoint.slider_card",
)  # fmt: skip


def test_light_modules_do_not_import_torch() -> None:
    code = f"import sys, importlib\nfor m in {LIGHT!r}:\n    importlib.import_module(m)\n"
    code += "    assert 'torch' not in sys.modules, m\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_lists_every_verb_without_torch() -> None:
    from dodgeburn.cli.main import VERBS

    code = "import sys\nfrom dodgeburn.cli.main import main\nassert main(['--help']) == 0\n"
    code += "assert 'torch' not in sys.modules and 'tyro' not in sys.modules"
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert time.perf_counter() - start < 5  # half a second on an idle machine; this only catches a heavy import
    for verb in VERBS:
        line = next(row for row in out.splitlines() if row.strip().startswith(verb + " "))
        assert len(line.split()) > 2, f"{verb} has no summary"
