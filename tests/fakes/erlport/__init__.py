"""Stands in for the Python side of ErlPort 0.11, which comes only with its Erlang package.

It has what CONTRACT section 9 lists as measured, and no protocol: what is cast is kept as Erlang would receive it.
"""

from __future__ import annotations
