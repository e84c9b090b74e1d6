"""The two ways the package speaks of trouble: an error that stops the job, a warning that is counted."""


class UserError(Exception):
    """Bad input, said in one line: what is wrong, what was expected, what to do. The CLI exits with 2."""


class DodgeburnWarning(UserWarning):
    """Something the user should know although the job goes on (a cut prompt, a tensor copied from A)."""
