"""Answers the first request; at the second it closes its output and lives on, reading."""

import os

from frames import reply, requests

for count, request in enumerate(requests()):
    if count == 0:
        reply(request)
    elif count == 1:
        os.close(1)
