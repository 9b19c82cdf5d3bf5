"""Answers every request but the first twice, and one that nobody made."""

from frames import reply, requests

for count, request in enumerate(requests()):
    reply(request)
    if count > 0:
        reply(request)
        reply({"id": request["id"] + 1_000_000})
