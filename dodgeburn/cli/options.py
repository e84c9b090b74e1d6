"""The options of a verb: read, explained and refused in one place, the same way for every verb.

Options are a dataclass. Those that everyday use needs are its own fields; further ones stand in groups, fields that are
dataclasses themselves, and `Grouped` lets an option of a group be read as if it were the verb's own. `--help` explains
the everyday options and names the others under their headings; `--help-all` explains all.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro

from dodgeburn.errors import UserError

CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
_HELP, _ALL = ("-h", "--help"), "--help-all"
_WIDTH = 100
T = TypeVar("T")


class Grouped:
    """Options in groups."""

    def __getattr__(self, name: str) -> Any:
        """An option of a group, as if it were one of these."""
        for group in groups(type(self)):
            options = self.__dict__.get(group.name)
            if options is not None and name in {option.name for option in fields(options)}:
                return getattr(options, name)
        raise AttributeError(f"{type(self).__name__} has no option {name!r}")


def groups(kind: Any) -> Iterator[Field[Any]]:
    """The fields of a dataclass of options that are groups: dataclasses made without arguments."""
    for one in fields(kind):
        if isinstance(one.default_factory, type) and is_dataclass(one.default_factory):
            yield one


def parse(kind: type[T], args: Sequence[str], verb: str, *examples: str, about: str | None = None) -> T:
    """`dodgeburn VERB ARGS` as an instance of `kind`, whose docstring (or `about`) explains the verb.

    Prints help and exits where that is asked for. Raises UserError of one line for what cannot be understood.
    """
    prog = f"dodgeburn {verb}"
    if _ALL in args or any(arg in _HELP for arg in args):
        _explain(kind, prog, _described(about or kind.__doc__ or "", examples), _ALL in args)
    _check_paths(kind, args)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _at_home(tyro.cli(kind, args=list(args), prog=prog, config=CONFIG))
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise UserError(f"{_one_line(said.getvalue())} (`{prog} --help` explains)") from None


def given_options(args: Sequence[str]) -> frozenset[str]:
    """Names of the options that stand in the arguments, as fields are named: "cfg_rescale" of --cfg-rescale=0.7. What
    was asked for is not the same as what differs from a default."""
    found = {arg.partition("=")[0] for arg in args if arg.startswith("-")}
    plain = {arg.lstrip("-").replace("-", "_") for arg in found}
    return frozenset(plain | {name.removeprefix("no_") for name in plain})


def _check_paths(kind: Any, args: Sequence[str]) -> None:
    """UserError where a path is an empty word, as of a variable that is not set: it would mean the current folder."""
    ways = set(_path_options(kind))
    for at, arg in enumerate(args):
        name, given_here, value = arg.partition("=")
        if name in ways and not (value if given_here else "".join(args[at + 1 : at + 2]) or at + 1 == len(args)):
            raise UserError(f"{name} is empty: expected a path behind it, or leave {name} out")


def _at_home(options: T) -> T:
    """The options with the home folder in place of every path's ~: shells put it there only at the start of a word, not
    in --out=~/merged.safetensors."""
    for one in fields(options):  # type: ignore[arg-type]
        value = getattr(options, one.name)
        if isinstance(value, Path):
            setattr(options, one.name, value.expanduser())
        elif is_dataclass(value):
            _at_home(value)
    return options


def _path_options(kind: Any) -> Iterator[str]:
    """How options that are paths are written, those of groups among them: --out, -o."""
    hints, inside = get_type_hints(kind, include_extras=True), {group.name for group in groups(kind)}
    for one in fields(kind):
        if one.name in inside:
            yield from _path_options(one.default_factory)
        elif "Path" in re.findall(r"\w+", str(hints[one.name])):
            yield f"--{_name(one.name, hints[one.name])}"
            for said in get_args(hints[one.name])[1:]:
                yield from getattr(said, "aliases", None) or ()


def _choices(match: re.Match[str]) -> str:
    """tyro's choices stand in no order, with None among them where an option may be left out."""
    option, value, known = match[2], match[1], match[3]
    names = sorted(name for name in re.findall(r"'(.*?)'", known) if name != "None")
    return f"{option} is {value}: expected one of {', '.join(names)}"


# What tyro says, and how our errors say it: the option, what was given, what was expected.
_REWORDED: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (
        r"Error parsing (\S+): no type matching .*: invalid literal for int\(\) with base 10: (.*)",
        r"\1 is \2: expected a whole number",
    ),
    (
        r"Error parsing (\S+): no type matching .*: could not convert string to float: (.*)",
        r"\1 is \2: expected a number",
    ),
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 is \2: expected a whole number"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 is \2: expected a number"),
    (r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)\.", _choices),
    (r"Missing value for argument '(.*)'\. Expected .*", r"\1: expected a value behind it"),
    (r"Unrecognized options: (.*)", r"not understood: \1"),
    (r"Missing from dodgeburn [^:]*: (\S+) (.*?) ?\(required\).*", r"\1 is missing: \2"),
    (r"Perhaps you meant: (\S+).*", r"perhaps you meant \1"),
    (r"Argument helptext: \S+ (?:(?:\{\S+\}\|[A-Z]+|[A-Z]+|\{\S+\}) )?(.*?)(?: \(default: .*)?", r"\1"),
)


def _one_line(box: str) -> str:
    """What tyro says, in one line: the title (in the frame of a box, or above a rule) and the pointer to the help are
    left out.
    """
    lines = [re.sub(r"^[│|] ?| ?[│|]$", "", re.sub(r"\x1b\[[0-9;]*m", "", line)).strip() for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.match(r"[╭╰+]", line) or not line:
            continue
        if re.fullmatch(r"[─-]+", line):
            parts.append([])
        else:
            parts[-1].append(line)
    said = []
    for part in (" ".join(lines) for lines in (parts if "╭" in box else parts[1:])):
        if part and not part.startswith("For full helptext"):
            for pattern, form in _REWORDED:
                if match := re.fullmatch(pattern, part):
                    part = match.expand(form) if isinstance(form, str) else form(match)
                    break
            said.append(part.rstrip("."))
    return "; ".join(said)


def given(options: Any) -> list[str]:
    """The options that differ from their defaults, those of groups among them."""
    kind, found = type(options), []
    inside = {group.name for group in groups(kind)}
    for one in fields(kind):
        value = getattr(options, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if one.name in inside:
            found += given(value)
        elif value != default:
            found.append(one.name)
    return found


# ------------------------------------------------------------------------------------------------------------- help


def _explain(kind: Any, prog: str, text: str, everything: bool) -> NoReturn:
    """Print help, and leave."""
    more = "" if everything else _named(kind)
    try:
        tyro.cli(_explained(kind, not more), args=["--help"], prog=prog, description=text, config=CONFIG)
    except SystemExit:
        if more:
            print(f"more options, which `{prog} {_ALL}` explains:\n{more}")
    sys.exit(0)


def _described(about: str, examples: Sequence[str]) -> str:
    """What stands above the options: the verb's explanation, wrapped where the terminal ends, and its examples.

    tyro joins lines that begin with a letter, so all of it is indented; it doubles empty lines, so they hold a space of
    no width.
    """
    width = min(shutil.get_terminal_size().columns, _WIDTH) - 2
    parts = ["\n".join(_wrapped(part, width)) for part in inspect.cleandoc(about).split("\n\n")]
    parts.append(f"example: {examples[0]}" if len(examples) == 1 else "\n".join(["examples:", *examples]))
    return "\n\u200b\n".join(textwrap.indent(part, "  ") for part in parts)


def _wrapped(paragraph: str, width: int) -> Iterator[str]:
    """Its lines, wrapped anew; what begins with a hyphen stays an item of its own."""
    first, *items = re.split(r"\n(?=- )", paragraph)
    yield textwrap.fill(" ".join(first.split()), width)
    for item in items:
        yield textwrap.fill(" ".join(item.split()), width, subsequent_indent="  ")


def _explained(kind: Any, everything: bool) -> Any:
    """The options as help shows them: each explained in a paragraph that wraps where the terminal does, and without
    "{None}|", "default: None" and the like, which say nothing. Not `everything`: without the groups.
    """
    hints, said = get_type_hints(kind, include_extras=True), _docstrings(kind)
    inside = {group.name for group in groups(kind)}
    shown: list[tuple[str, Any, Any]] = []
    for one in fields(kind):
        if one.name in inside:
            if everything:
                made = _explained(one.default_factory, True)
                shown.append((one.name, made, field(default_factory=made)))
            continue
        default, kept = one.default, field(default=one.default)
        if one.default_factory is not MISSING:
            default, kept = one.default_factory(), field(default_factory=one.default_factory)
        shown.append((one.name, _worded(hints[one.name], said.get(one.name), default), kept))
    return make_dataclass(kind.__name__, shown, namespace={"__doc__": kind.__doc__, "__module__": kind.__module__})


def _worded(hint: Any, words: str | None, default: Any) -> Any:
    """The type of an option, with how help is to say it; what the option itself says of that stays."""
    bare, own = (get_args(hint)[0], hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())
    silent = "" if default in (None, (), [], "") or isinstance(default, bool) else None
    if default is True and words:  # the flag is --no-...
        words = f"Do not {words[0].lower()}{words[1:]}"
    kinds = [part for part in get_args(bare) if part is not type(None)]
    metavar = None
    if len(kinds) == 1 and len(get_args(bare)) == 2:  # may be left out
        if kinds[0] in (int, float, str, Path):
            metavar = kinds[0].__name__.upper()
        elif get_origin(kinds[0]) is Literal:
            metavar = f"{{{','.join(map(str, get_args(kinds[0])))}}}"
    return Annotated[(bare, tyro.conf.arg(help=words, help_behavior_hint=silent, metavar=metavar), *own)]


def _docstrings(kind: type[Any]) -> dict[str, str]:
    """The strings behind the fields of a dataclass and of its bases, each on one line."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not is_dataclass(one):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(body, ast.ClassDef)
        for option, behind in itertools.pairwise(body.body):
            match option, behind:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[name] = " ".join(words.split())
    return found


def _named(kind: Any) -> str:
    """The groups' options by name, a paragraph a group."""
    lines = []
    for group in groups(kind):
        inside: Any = group.default_factory
        hints = get_type_hints(inside, include_extras=True)
        names = [
            f"{'--no-' if one.default is True else '--'}{_name(one.name, hints[one.name])}" for one in fields(inside)
        ]
        line = f"  {group.name.replace('_', ' ')}: {' '.join(names)}"
        lines += textwrap.wrap(line, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def _name(name: str, hint: Any) -> str:
    """An option as it is written on the command line, without the hyphens before it."""
    said = [getattr(one, "name", None) for one in get_args(hint)[1:]]
    return next((text for text in said if isinstance(text, str)), name).replace("_", "-")


def as_option(name: str) -> str:
    """A setting as it is written on the command line: batch_size is --batch-size."""
    return f"--{name.replace('_', '-')}"
