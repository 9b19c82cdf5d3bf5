"""Dies of its first request past the first ping, of which it leaves a note in FAKE_FILE; with the note, answers all."""

import os

from frames import read, reply, requests

path = os.environ["FAKE_FILE"]
if not os.path.exists(path):
    reply(read())
    request = read()
    with open(path, "w") as file:
        file.write(str(request.get("timeout_ms", 0)))
    os._exit(6)
with open(path) as file:
    first_ms = int(file.read())
seen = []
for request in requests():
    seen.append(request["command"])
    reply(request, {"timeout_ms": request.get("timeout_ms"), "first_ms": first_ms, "seen": seen})
