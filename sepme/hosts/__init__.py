"""Adapters of the library to model hosts."""
