"""Decodes the packets of Erlang's `{:packet, 4}`: a 4-byte big-endian length, then that many bytes. Pure; no I/O."""

from __future__ import annotations

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
