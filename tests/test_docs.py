"""The documentation's links lead somewhere, its commands parse, and no file names a place on somebody's machine."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tyro

from dodgeburn.cli.main import VERBS
from dodgeburn.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
# A folder of one machine: what stands at the root of a path (not within another path, a URL or a pattern).
LOCAL = re.compile(
    r"(?<![\w.~/$:*)}>-])/(?:work|home|root|Users|tmp|mnt|opt|srv|var|private|workspace|content)/[\w.]|\b[A-Za-z]:\\\w"
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> tuple[str, str]:
    """The prose (code spans blanked) and the fenced code of a page."""
    prose, code, fenced = [], [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            code.append(line)
        else:
            prose.append(line)
    return re.sub(r"`[^`]*`", "", "\n".join(prose)), "\n".join(code)


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links and images of a page that lead to no file, or to no heading of it."""
    out = []
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(blocks(text)[0]):
        if re.match(r"[a-z][a-z+.-]*:", target, re.I):
            continue  # the web: tests ask nothing of it
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            out.append(target)
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            out.append(target)
    return out


def commands(code: str) -> list[list[str]]:
    """Arguments of every line of shell code that calls dodgeburn (lines ended by a backslash go on)."""
    lines = [line.strip().removeprefix("$ ") for line in code.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dodgeburn ")]


def options_in(source: str) -> set[str]:
    """Options that a file may define: fields of its dataclasses, names given to them, and "--names" as they stand."""
    found = set(re.findall(r'"--([a-z][a-z0-9-]*)"', source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id.replace("_", "-"))
        elif isinstance(node, ast.keyword) and node.arg == "name" and isinstance(node.value, ast.Constant):
            found.add(str(node.value.value))
    return found | {f"no-{name}" for name in found}


@cache
def options_of(*places: str) -> frozenset[str]:
    """Those of all files in these folders, or in these files."""
    files = [
        file for place in places for file in ([ROOT / place] if place.endswith(".py") else (ROOT / place).glob("*.py"))
    ]
    return frozenset().union(*(options_in(file.read_text(encoding="utf-8")) for file in files))


ROOTS = (ROOT, ROOT / "dodgeburn", ROOT / "dodgeburn" / "merge")  # what paths on a page are told from
FOREIGN = {"help", "version", "no-deps", "multi-gpu", "hypothesis-profile"}  # of everything, pip, accelerate, pytest
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")
SCRIPT = re.compile(r"python (benchmarks/\w+\.py|examples/\w+\.py)([^`\n|]*)")
PART = re.compile(r"`((?:dodgeburn/|benchmarks/|examples/|tests/)?[a-z_]+/[\w./-]+\.(?:py|sh|yaml|toml))`")


def strange_options(text: str) -> list[str]:
    """Options that a page names and neither a verb nor a benchmark has; those of a script's own where it is called."""
    known = options_of("dodgeburn/cli", "benchmarks") | FOREIGN
    found = [f"--{name}" for name in OPTION.findall(text) if name not in known]
    for script, rest in SCRIPT.findall(text):
        if not (ROOT / script).is_file():
            found.append(script)
            continue
        shared = ["benchmarks/sizes.py"] if "from sizes import" in (ROOT / script).read_text(encoding="utf-8") else []
        own = options_of(script, *shared)
        found += [f"{script} --{name}" for name in OPTION.findall(rest) if name not in own]
    return found


def lost_files(text: str) -> list[str]:
    """Files of the repository that a page names and that aren't there; see ROOTS."""
    return [name for name in PART.findall(text) if not any((root / name).is_file() for root in ROOTS)]


class Parsed(Exception):
    """The arguments were understood: go no further."""


def check_command(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the verb exists and understands these arguments; nothing is run."""
    assert args[0] in VERBS, f"no verb {args[0]}"
    parse = tyro.cli

    def stop(*given: Any, **named: Any) -> None:
        parse(*given, **named)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(tyro, "cli", stop)
        with pytest.raises(Parsed):
            importlib.import_module(f"dodgeburn.cli.{args[0]}").main(args[1:])


def text_files() -> list[Path]:
    """Files under version control (or, in an unpacked archive, all that are no products)."""
    try:
        found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        names = [name for name in found.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = []
        for folder, below, files in os.walk(ROOT):
            below[:] = [d for d in below if d not in ("__pycache__", "build", "dist", "runs") and d[0] != "."]
            names += [os.path.relpath(os.path.join(folder, file), ROOT) for file in files]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def local_paths(text: str) -> list[str]:
    return [text[max(0, m.start() - 20) : m.end() + 30].strip() for m in LOCAL.finditer(text)]


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text(encoding="utf-8")
    for args in commands(blocks(text)[1]):
        check_command(args, monkeypatch)
    # Within a sentence a command may be unfinished, but its verb exists.
    for verb in re.findall(r"`dodgeburn ([^\s`]+)", text):
        assert verb in (*VERBS, "VERB") or verb.startswith("-"), f"no verb {verb}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_and_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert strange_options(text) == [] and lost_files(text) == []


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_help_parse(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"dodgeburn.cli.{verb}")
    examples = [module.EXAMPLE] if hasattr(module, "EXAMPLE") else list(module.EXAMPLES.values())
    assert examples
    for args in commands("\n".join(examples)):
        check_command(args, monkeypatch)


def test_every_verb_has_its_page() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for verb in VERBS:
        assert f"dodgeburn {verb}" in pages or f"make {verb}" in pages, f"{verb} is in no page"


def test_no_file_names_a_local_path() -> None:
    found = {}
    for path in text_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        if places := local_paths(text):
            found[name_of(path)] = places
    assert found == {}


def test_the_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading, here\n[a](page.md#a-heading-here) ![b](gone.png) [c](https://example.org) `[d](code.md)`\n"
        "[e](page.md#nowhere) [f](#a-heading-here)\n```\n[g](fenced.md)\n$ dodgeburn fly --now  # a comment\n"
        "dodgeburn merge a b \\\n  --bass 0.4\ndodgeburn merge a b --base 0.4\n```\n"
    )
    assert broken_links(page) == ["gone.png", "page.md#nowhere"]
    unknown, mistyped, right = commands(blocks(page.read_text())[1])
    assert unknown == ["fly", "--now"]
    with pytest.raises(AssertionError):
        check_command(unknown, monkeypatch)
    with pytest.raises(UserError, match="not understood: --bass"):
        check_command(mistyped, monkeypatch)
    check_command(right, monkeypatch)
    wrong = "`--bass 2` `python benchmarks/dpo.py --quick --lora 2` `python benchmarks/gone.py` `--no-calibrate`"
    assert strange_options(wrong) == ["--bass", "benchmarks/dpo.py --lora", "benchmarks/gone.py"]
    assert lost_files("`merge/run.py` `merge/walk.py` `benchmarks/dpo.py` `rework/meters.py`") == [
        "merge/walk.py", "rework/meters.py",
    ]  # fmt: skip
    home = "/".join(["", "home", "ann", "models"])
    assert local_paths(f"see {home}") and local_paths(f"'{home}'") and local_paths("C:" + "\\Users")
    assert not local_paths("https://a.org/home/x a/work/b /proc/cpuinfo $HOME/tmp/x ~/work/x /path/to/python")
