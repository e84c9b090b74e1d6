"""The options of a verb: groups, the two kinds of help, and one line for what cannot be understood."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from dodgeburn.cli.options import Grouped, given, parse
from dodgeburn.errors import UserError


@dataclass
class Rare:
    """Seldom needed."""

    eta: float = 1.0
    """How strong."""
    mirror: bool = True
    """Flip half."""
    kind: Annotated[str, tyro.conf.arg(name="as")] = "full"
    """Which form."""


@dataclass
class Verb(Grouped):
    """Do a thing."""

    steps: int = 20
    """How long."""
    names: list[str] = field(default_factory=list)
    """Which ones."""
    width: int | None = None
    """How wide it is, in pixels of the picture that
    comes out. Left out: as it was."""
    flip: bool = False
    """Mirror it."""
    rare_things: Rare = field(default_factory=Rare)


def test_options_of_groups_read_as_the_verb_s_own() -> None:
    options = parse(Verb, ["--eta", "2", "--no-mirror", "--names", "a", "b"], "do", "dodgeburn do")
    assert (options.steps, options.eta, options.mirror, options.names) == (20, 2.0, False, ["a", "b"])
    assert given(options) == ["names", "eta", "mirror"] and given(Verb()) == []
    with pytest.raises(AttributeError, match="no option 'nothing'"):
        _ = options.nothing


def test_short_help_explains_the_everyday_options_and_names_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Verb, ["--steps", "3", "-h"], "do", "dodgeburn do", "dodgeburn do --eta 2")
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "How long." in said and "How strong." not in said
    assert "  examples:\n  dodgeburn do\n  dodgeburn do --eta 2\n" in said
    assert "(default: 20)" in said and "None" not in said and "False" not in said and "--width INT " in said
    assert re.search(r"How wide it is, in pixels of the picture that comes out\.", re.sub(r"[\s│]+", " ", said))
    assert said.splitlines()[-2:] == [
        "more options, which `dodgeburn do --help-all` explains:", "  rare things: --eta --no-mirror --as",
    ]  # fmt: skip


def test_full_help_explains_everything_under_headings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Verb, ["--help-all"], "do", "dodgeburn do")
    said = capsys.readouterr().out
    heading = said.index("rare-things options")
    option = said.index("--eta", heading)
    assert "--no-mirror" in said and "Do not flip half." in said and "True" not in said
    assert said.index("How long.") < heading < said.index("Seldom needed.") < option < said.index("How strong.")
    assert "example: dodgeburn do" in said and "more options" not in said


@pytest.mark.parametrize(("width", "most"), [("60", 60), ("200", 100)])
def test_the_explanation_wraps_where_the_terminal_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: str, most: int
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    about = "Do it. " + "It takes a while. " * 9 + "\n\nThen it is done."
    with pytest.raises(SystemExit):
        parse(Verb, ["--help"], "do", "dodgeburn do", about=about)
    said = capsys.readouterr().out
    assert re.search(r"\bwhile\.\n\u200b\n  Then it is done\.\n\u200b\n  example: dodgeburn do\n", said)
    shown = said[said.index("  Do it.") : said.index("  Then")].splitlines()
    assert most - 20 < max(map(len, shown)) <= most


def test_a_list_stays_a_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    about = "Methods,\nfrom the cheapest:\n- one: " + "long " * 20 + "\n- two: short\n\nThen more."
    with pytest.raises(SystemExit):
        parse(Verb, ["--help"], "do", "dodgeburn do", about=about)
    lines = capsys.readouterr().out.splitlines()
    assert "  Methods, from the cheapest:" in lines and "  - two: short" in lines and "  Then more." in lines
    first = next(i for i, line in enumerate(lines) if line.startswith("  - one: long"))
    assert lines[first + 1].startswith("    long") and max(map(len, lines[first : first + 2])) <= 60


@pytest.mark.parametrize("width", ["60", "200"])
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--steps", "many"], "--steps is 'many': expected a whole number; How long (`dodgeburn do --help` explains)"),
        (["--eta", "big"], "--eta is 'big': expected a number"), (["--steps"], "--steps: expected a value behind it"),
        (["--width", "wide"], "--width is 'wide': expected a whole number; How wide it is"),
        (["--stepz", "3"], "not understood: --stepz, 3; perhaps you meant --steps"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_one_line(
    args: list[str], said: str, width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(UserError) as caught:
        parse(Verb, args, "do", "dodgeburn do")
    assert said in str(caught.value) and capsys.readouterr() == ("", "")


@dataclass
class Places:
    """Where further things lie."""

    masks: Path | None = None
    """A folder of masks."""


@dataclass
class Files(Grouped):
    """Read and write."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Where to write."""
    negative: str = "blurred"
    """What is not wanted."""
    places: Places = field(default_factory=Places)


@pytest.mark.parametrize(
    ("args", "named"),
    [(["-o", ""], "-o"), (["--out="], "--out"), (["--out", "here", "--masks", ""], "--masks")],
)
def test_an_empty_path_is_no_way_to_say_the_current_folder(args: list[str], named: str) -> None:
    """Path("") is ".", so a variable that was not set would write there."""
    with pytest.raises(UserError, match=rf"^{named} is empty: expected a path behind it, or leave {named} out$"):
        parse(Files, args, "do", "dodgeburn do")


def test_other_words_may_be_empty() -> None:
    options = parse(Files, ["-o", "here", "--negative", ""], "do", "dodgeburn do")
    assert (options.out, options.negative, options.masks) == (Path("here"), "", None)
    with pytest.raises(UserError, match="expected a value behind it"):
        parse(Files, ["-o"], "do", "dodgeburn do")


@dataclass
class Written(Grouped):
    """Write a thing."""

    out: Path | None = None
    """Where."""


def test_home_is_put_in_place_of_a_path_s_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shells do that at the start of a word only, not in --out=~/a.safetensors."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(Written, ["--out=~/a b"], "write", "dodgeburn write").out == tmp_path / "a b"
