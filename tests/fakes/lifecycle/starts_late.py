"""Needs FAKE_START_MS before it reads anything, then answers well."""

import os
import time

from frames import reply, requests

time.sleep(int(os.environ["FAKE_START_MS"]) / 1000)
for request in requests():
    reply(request)
