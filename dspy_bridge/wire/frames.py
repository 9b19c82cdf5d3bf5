"""Packets of Erlang's `{:packet, 4}`: a 4-byte big-endian unsigned length, then that many bytes. Pure; no I/O.

Most reads bring many small frames or one piece of a large one, so whole frames are cut straight from the chunk that
holds them, and the pieces of a large frame are joined once, when the last has come.
"""

from __future__ import annotations

HEADER_BYTES = 4


class TooLarge:
    """Stands in the stream for a frame that was longer than allowed, or than there was memory for (`no_memory`).

    It has been read past, or will be.
    """

    __slots__ = ("length", "no_memory")

    def __init__(self, length: int, no_memory: bool = False) -> None:
        self.length = length
        self.no_memory = no_memory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TooLarge) and (other.length, other.no_memory) == (self.length, self.no_memory)

    def __hash__(self) -> int:
        return hash(self.length)

    def __repr__(self) -> str:
        return f"TooLarge({self.length}, {self.no_memory})"


def header(length: int) -> bytes:
    """The four bytes that go before a payload of `length` bytes."""
    return length.to_bytes(HEADER_BYTES, "big")


class FrameDecoder:
    """Cuts a byte stream into payloads, however it was split on its way."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: the longest payload that is kept; a longer one is skipped without being stored."""
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._have = 0
        # Length of the frame whose payload is being collected; -1 while its header is.
        self._length = -1
        self._skip = 0

    def feed(self, data: bytes) -> list[bytes | TooLarge]:
        """Take the next bytes of the stream, give the frames that they complete, in order."""
        out: list[bytes | TooLarge] = []
        position, end = 0, len(data)
        if not self.mid_frame:
            # Whole frames, one after another: what nearly every read brings.
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
                try:
                    self._parts.append(data[position : position + step])
                except MemoryError:
                    # Here, not at the reader's: the frames that `out` has are to be served, and what follows is there.
                    if (refused := self.give_up()) is None:
                        raise
                    out.append(refused)
                    continue
                self._have += step
                position += step
                if self._have < wanted:
                    break
                whole = self._joined()
                self._parts.clear()
                self._have = 0
            else:
                whole = data[position : position + step]
                position += step
            if self._length >= 0:
                out.append(TooLarge(self._length, no_memory=True) if whole is None else whole)
                self._length = -1
                continue
            assert whole is not None
            length = int.from_bytes(whole, "big")
            if length > self._max_bytes:
                # Told at once: its sender learns of the refusal before the last byte has come.
                out.append(TooLarge(length))
                self._skip = length
            elif length == 0:
                out.append(b"")
            else:
                self._length = length
        return out

    def give_up(self) -> TooLarge | None:
        """Drop what has been collected of a frame, as there is no memory for the rest, which will be read past.

        None if there is no such frame.
        """
        if self._length < 0:
            return None
        refused = TooLarge(self._length, no_memory=True)
        self._skip = self._length - self._have
        self._parts.clear()
        self._have, self._length = 0, -1
        return refused

    def _joined(self) -> bytes | None:
        """The parts as one; None if there is no memory for it, which the parts themselves may have taken."""
        try:
            return b"".join(self._parts)
        except MemoryError:
            return None

    @property
    def mid_frame(self) -> bool:
        """Whether the stream stands inside a frame: at end of input, a truncated one."""
        return bool(self._have or self._skip or self._length >= 0)
