from .processing import sampling_prepare  # noqa: F401
