"""Answers with its pid, 50 ms after it has read the request; reads nothing meanwhile."""

import os
import time

from frames import reply, requests

for request in requests():
    time.sleep(0.05)
    reply(request, {"pid": os.getpid()})
