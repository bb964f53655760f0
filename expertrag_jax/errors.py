"""The exceptions that a command turns into one sentence and an exit code of their own (see ``launch.py``)."""


class UserError(Exception):
    """Bad input: a file, a flag, a gin value, a checkpoint of another shape.

    The message is one sentence: what is wrong, where, and how to mend it. Commands print it as
    ``error: ...`` without a traceback and exit with code 2 (see ``launch.py``).
    """


class QualityMissed(Exception):
    """A job is done and its files are written, but the result is worse than the job promises.

    The message says what was missed and what to change. Commands print it as ``missed: ...`` and exit with code 3.
    """
