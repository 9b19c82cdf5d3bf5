"""Stands in for ErlPort 0.11.0, whose Python side comes only with its Erlang package.

No code of it is here and no protocol: terms are handed over in the notation of `erlterms`. What it does was read in
ErlPort's own functions and tried with the real one (OTP 27, Python 3.11):

| here | read from |
| --- | --- |
| atoms arrive as their Latin-1 bytes, true, false and undefined as Python's own | `decode_term`, `Atom` in erlterms.py; `encode_term` in erlport_utils.erl (`minor_version` 1) |
| an atom beyond Latin-1, great depth, a key that has no hash: Python ends | `decode_term`; `Port.read` in erlproto.py; `MessageHandler._receive` and `start` in erlang.py, which catch EOFError alone |
| equal keys (an atom and a binary, 1 and true) become one | `decode_term`: it fills a dict |
| lists and maps arrive as types that refuse changes | `List`, `Map`, `ImproperList` in erlterms.py |
| pids, references, ports, funs and bitstrings arrive opaque, their encoding as `data` | `prepare_term` in erlport_utils.erl; `OpaqueObject` |
| str goes as a list of code points, None as undefined; true and false as 1 and 0, but only in a list of at most 65,535 that has nothing but them and integers from 0 to 255; what else Python has as a pickle, or ValueError | `encode_term` in erlterms.py |
| a float that is not a number ends the instance | `encode_term`; `handle_port_data` in erlport.erl |
| `cast` encodes on the caller's thread and looks at no receiver; one that `!` refuses ends the instance | `MessageHandler.cast`, `Port.write`; `send` in erlport.erl |
| once Erlang or the instance is gone, `cast` raises EOFError | `Port.write` |
| after the end of input main returns, and Python ends as after any script | `Port.read`, `MessageHandler.start`, `main` in cli.py |
"""  # noqa: E501 - a table

from __future__ import annotations
