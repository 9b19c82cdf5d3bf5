"""Frames get descriptors of their own before any code that might print is imported.

Whatever Python code, C code or a child process writes to descriptor 1 afterwards lands on stderr, and what reads
descriptor 0 finds the end of input: neither can break the protocol.
"""

import os


def take() -> tuple[int, int]:
    """Move stdin and stdout away; return `(reading, writing)`, descriptors that no child process inherits."""
    # os.dup gives non-inheritable descriptors (PEP 446).
    reading, writing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return reading, writing
