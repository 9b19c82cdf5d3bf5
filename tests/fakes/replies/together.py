"""Answers `get_stats` only once the file FAKE_THEIRS is there; makes FAKE_MINE when asked. Others at once.

Its uptime is FAKE_UPTIME, 6.5 s by default. Two of them, each with the other's file, answer if both are asked
before either has answered.
"""

import os
import time

from frames import reply, requests

for request in requests():
    if request["command"] != "get_stats":
        reply(request)
        continue
    open(os.environ["FAKE_MINE"], "w").close()
    while not os.path.exists(os.environ["FAKE_THEIRS"]):
        time.sleep(0.01)
    commands = {"ping": {"count": 3}, "get_stats": {"count": 7}}
    load = {"in_flight": 1, "queued": 2, "commands": commands}
    reply(
        request,
        {"memory_usage": {"rss": 4_000_000, "vms": 5}, "uptime": float(os.environ.get("FAKE_UPTIME", "6.5")), **load},
    )
