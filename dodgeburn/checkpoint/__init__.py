"""Checkpoint files: read and written safely, their layouts known, their keys converted, their metadata kept.

Nothing here imports torch until a tensor is asked for.
"""
