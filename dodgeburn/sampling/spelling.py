"""Names as users type them: other spellings understood, unknown ones answered with near ones (no torch here)."""

from collections.abc import Iterable, Mapping

from dodgeburn.errors import UserError, did_you_mean


def nearest(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for an unknown `name`: near spellings first, then all that is known."""
    names = list(known)
    return f"unknown {kind} {name!r}: {did_you_mean(name, names)}known: {', '.join(names)}"


def plain(name: str) -> str:
    """A name without its typography: "DPM++ 2M SDE" is "dpm++_2m_sde"."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def resolve(kind: str, name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """The one of `known` that `name` stands for, whatever its case, blanks and hyphens. Raises UserError."""
    spelled = (aliases or {}).get(plain(name), plain(name))
    for candidate in known:
        if plain(candidate) == plain(spelled):
            return candidate
    raise UserError(nearest(kind, name, known))
