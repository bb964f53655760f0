"""The one exception that means: the user's input is at fault, and this sentence says how to mend it."""


class UserError(Exception):
    """Bad input: a file, a flag, a gin value, a checkpoint of another shape.

    The message is one sentence: what is wrong, where, and how to mend it. Commands print it as
    ``error: ...`` without a traceback and exit with code 2 (see ``launch.py``).
    """
