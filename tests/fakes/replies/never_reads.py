"""Answers FAKE_ANSWERS requests (1 if unset), then never reads again; good if FAKE_FILE is there."""

import os
import time

from frames import read, reply, requests

if os.path.exists(os.environ.get("FAKE_FILE", "/no/such/file")):
    for request in requests():
        reply(request)
for _ in range(int(os.environ.get("FAKE_ANSWERS", "1"))):
    reply(read())
time.sleep(600)
