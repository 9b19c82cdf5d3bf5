"""The packets of Erlang's `{:packet, 4}`: a 4-byte big-endian length, then that many bytes. Pure; no I/O."""

from __future__ import annotations

import re

HEADER_BYTES = 4


class TooLarge(int):
    """Replaces a frame that is longer than allowed, and is skipped: its length."""


def header(length: int) -> bytes:
    return length.to_bytes(HEADER_BYTES, "big")


class FrameDecoder:
    """Splits a byte stream into payloads, whatever chunks it comes in."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: the longest payload; a longer one is skipped without being stored."""
        self._max_bytes = max_bytes
        # The current frame: the header so far, then the pieces so far and the bytes that are missing or to be skipped.
        self._header = b""
        self._pieces: list[bytes] = []
        self._missing = 0
        self._skip = 0

    def feed(self, data: bytes) -> list[bytes | TooLarge]:
        """Take the next bytes of the stream; returns the frames that they complete, in order."""
        frames: list[bytes | TooLarge] = []
        position, end = 0, len(data)
        while position < end:
            if self._skip:
                step = min(self._skip, end - position)
                self._skip -= step
                position += step
            elif self._missing:
                piece = data[position : position + self._missing]
                position += len(piece)
                self._missing -= len(piece)
                self._pieces.append(piece)
                if not self._missing:
                    # Joined once; a single piece is not copied.
                    frames.append(b"".join(self._pieces))
                    self._pieces.clear()
            else:
                step = min(HEADER_BYTES - len(self._header), end - position)
                self._header += data[position : position + step]
                position += step
                if len(self._header) == HEADER_BYTES:
                    length, self._header = int.from_bytes(self._header, "big"), b""
                    if length > self._max_bytes:
                        # At once, not after the last byte of the frame.
                        frames.append(TooLarge(length))
                        self._skip = length
                    elif length:
                        self._missing = length
                    else:
                        frames.append(b"")
        return frames

    @property
    def mid_frame(self) -> bool:
        """Whether the stream is inside a frame; at the end of input it was truncated."""
        return bool(self._header or self._missing or self._skip)


# Pings and pongs answered here are at most this long, so that only the last byte of a packet's length counts.
MAX_PING_BYTES = 256
# At most 18 digits in the id, which any counter of a BEAM has; a longer one could make the pong too long. Of a key that
# is there twice the last value counts, as for the decoder.
_MEMBER = (
    rb'"id": ?(0|[1-9][0-9]{0,17})|"command": ?("ping")|"args": ?\{\}'
    rb'|"timestamp": ?"[0-9:.TZ+-]*"|"timeout_ms": ?[1-9][0-9]{0,9}'
)
_PING = re.compile(rb"\x00\x00\x00([\x00-\xff])\{(?:(?:" + _MEMBER + rb')(?:, ?(?=")|(?=\})))+\}').match
_PONG = b'{"id":%b,"success":true,"result":{"status":"ok","timestamp":%.6f}}'


def answer_pings(data: bytes, now: float) -> tuple[bytes, int, int]:
    """The replies to the pings that `data` starts with, as packets; the number of those pings, and of their bytes.

    Pings without arguments, whatever the order of their keys, are answered without decoding: a round trip over a port
    takes 1.4 times that of a bare echo; decoded and counted as a call, 2.2 times.
    """
    pongs: list[bytes] = []
    used, size = 0, len(data)
    ping = _PING(data)
    while ping is not None and ping.end() - used - 4 == data[used + 3]:
        _, id, command = ping.groups()
        if id is None or command is None:
            break
        pong = _PONG % (id, now)
        packet = b"\x00\x00\x00%c%b" % (len(pong), pong)
        used = ping.end()
        if used == size and not pongs:
            return packet, 1, used  # what nearly every read brings
        pongs.append(packet)
        ping = _PING(data, used)
    return b"".join(pongs), len(pongs), used
