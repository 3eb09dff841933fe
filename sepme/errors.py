"""The one exception that users see: a sentence that says what to do."""


class SepMEError(ValueError):
    """Bad input. The message is one sentence for the user; the CLI exits with 2, a node shows it.

    Half characters (lone surrogates), which no terminal, log or socket can encode, stand in it as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode())


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or the system says that memory ran out, whatever its type."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        s in text for s in ("out of memory", "t allocate memory", "not allocate memory", "bad_alloc")
    )


class Interrupted(Exception):
    """The user stopped a long job; what was reached is in its checkpoint."""
