"""The two ways the package speaks of trouble: an error that stops the job, a warning that is counted."""


class UserError(Exception):
    """Bad input, said in one line: what is wrong, what was expected, what to do. The CLI exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class DodgeburnWarning(UserWarning):
    """Something the user should know although the job goes on (a cut prompt, a tensor copied from A)."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text with control characters written out: names from files may hold line ends and terminal codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
