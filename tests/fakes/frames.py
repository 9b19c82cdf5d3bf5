"""What all fakes share: frames on descriptors 0 and 1, requests as dicts. Standard library only."""

import json
import os
import struct
import sys


def read_exactly(count):
    data = b""
    while len(data) < count:
        more = os.read(0, count - len(data))
        if not more:
            sys.exit(0)
        data += more
    return data


def read():
    """The next request; ends the process at end of input."""
    (length,) = struct.unpack(">I", read_exactly(4))
    return json.loads(read_exactly(length))


def requests():
    """All requests; cancel frames and the like, which have no id, are skipped."""
    while True:
        message = read()
        if "id" in message:
            yield message


def write_raw(payload):
    data = struct.pack(">I", len(payload)) + payload
    try:
        while data:
            data = data[os.write(1, data) :]
    except BrokenPipeError:
        sys.exit(0)


def reply(request, result=None):
    """A good reply: `id` first, as the protocol has it."""
    if result is None:
        result = {"status": "ok", "timestamp": 1.5}
    write_raw(json.dumps({"id": request["id"], "success": True, "result": result}).encode())
