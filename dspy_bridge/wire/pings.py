"""Pings in the form in which the Bridge writes them, answered from packet to packet without decoding. Pure.

One at a time, a round trip over a port takes 6.8 µs instead of 8.3, where a bare echo takes 5.4; with 256 in flight, a
ping takes 1.2 µs instead of 4.5.
"""

from __future__ import annotations

import re

# Pings and pongs answered here are at most this long, so that only the last byte of a packet's length counts.
MAX_BYTES = 256
# At most 18 digits in the id, which any counter of a BEAM has; a longer one could make the pong too long.
_PING = re.compile(
    rb'\x00\x00\x00([\x00-\xff])\{"id":(0|[1-9][0-9]{0,17})(?:,"timeout_ms":[1-9][0-9]{0,9})?'
    rb',"command":"ping","args":\{\},"timestamp":"[0-9:.TZ+-]*"\}'
).match
_PONG = b'{"id":%b,"success":true,"result":{"status":"ok","timestamp":%.6f}}'


def answer(data: bytes, now: float) -> tuple[bytes, int, int]:
    """The replies to the pings that `data` starts with, as packets; the number of those pings, and of their bytes."""
    pongs: list[bytes] = []
    used, size = 0, len(data)
    ping = _PING(data)
    while ping is not None and ping.end() - used - 4 == data[used + 3]:
        pong = _PONG % (ping[2], now)
        packet = b"\x00\x00\x00%c%b" % (len(pong), pong)
        used = ping.end()
        if used == size and not pongs:
            return packet, 1, used  # what nearly every read brings
        pongs.append(packet)
        ping = _PING(data, used)
    return b"".join(pongs), len(pongs), used
