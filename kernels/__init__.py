"""Triton kernels for the operations of ``sepme.ops`` (installed by pip as ``sepme_kernels``). None yet: the eager body runs."""
