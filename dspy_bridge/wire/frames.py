"""Decodes the packets of Erlang's `{:packet, 4}`: a 4-byte big-endian length, then that many bytes. Pure; no I/O.

Most reads bring many small frames or one piece of a large frame. So whole frames are sliced from the chunk that holds
them, and the pieces of a large frame are joined once, when it is complete.
"""

from __future__ import annotations

HEADER_BYTES = 4


class TooLarge(int):
    """Replaces a frame that is longer than allowed, and is skipped: its length."""


def header(length: int) -> bytes:
    """The length prefix of a payload of `length` bytes."""
    return length.to_bytes(HEADER_BYTES, "big")


class FrameDecoder:
    """Splits a byte stream into payloads, whatever chunks it comes in."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: the longest payload; a longer one is skipped without being stored."""
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._have = 0
        # The length of the current frame; -1 while its header is incomplete.
        self._length = -1
        self._skip = 0

    def feed(self, data: bytes) -> list[bytes | TooLarge]:
        """Take the next bytes of the stream; returns the frames that they complete, in order."""
        out: list[bytes | TooLarge] = []
        position, end = 0, len(data)
        if not self.mid_frame:
            # Whole frames, as nearly every read brings.
            while position + HEADER_BYTES <= end:
                start = position + HEADER_BYTES
                stop = start + int.from_bytes(data[position:start], "big")
                if stop > end or stop - start > self._max_bytes:
                    break
                out.append(data[start:stop])
                position = stop
        while position < end:
            if self._skip:
                step = min(self._skip, end - position)
                self._skip -= step
                position += step
                continue
            wanted = HEADER_BYTES if self._length < 0 else self._length
            step = min(wanted - self._have, end - position)
            if self._have or step < wanted:
                self._parts.append(data[position : position + step])
                self._have += step
                position += step
                if self._have < wanted:
                    break
                whole = b"".join(self._parts)
                self._parts.clear()
                self._have = 0
            else:
                whole = data[position : position + step]
                position += step
            if self._length >= 0:
                out.append(whole)
                self._length = -1
                continue
            length = int.from_bytes(whole, "big")
            if length > self._max_bytes:
                # At once, not after the last byte of the frame.
                out.append(TooLarge(length))
                self._skip = length
            elif length == 0:
                out.append(b"")
            else:
                self._length = length
        return out

    @property
    def mid_frame(self) -> bool:
        """Whether the stream is inside a frame; at the end of input it was truncated."""
        return bool(self._have or self._skip or self._length >= 0)
