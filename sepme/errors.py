"""The one exception that users see: a sentence that says what to do."""


class SepMEError(ValueError):
    """Bad input. The message is one sentence for the user; the CLI exits with 2, a node shows it."""


class Interrupted(Exception):
    """The user stopped a long job; what was reached is in its checkpoint."""
