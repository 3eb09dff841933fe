"""The exception that users see."""

import pickle

from sepme.errors import SepMEError


def test_every_message_can_be_printed() -> None:
    error = SepMEError("There is no concept 'st\ud83dar' 🐱 here.")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "There is no concept 'st\\ud83dar' 🐱 here."  # noqa: S301
