"""Answers `late` only when the request after it has come, and then that one too."""

from frames import reply, requests

held = []
for request in requests():
    if request["command"] == "late":
        held.append(request)
        continue
    for late in held:
        reply(late, {"late": True})
    held = []
    reply(request)
