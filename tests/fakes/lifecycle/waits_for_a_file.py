"""Reads nothing until the file FAKE_FILE exists; then answers each request with the number of those before it."""

import os
import time

from frames import reply, requests

while not os.path.exists(os.environ["FAKE_FILE"]):
    time.sleep(0.01)
for count, request in enumerate(requests()):
    reply(request, {"args": request["args"], "timeout_ms": request.get("timeout_ms"), "before": count})
