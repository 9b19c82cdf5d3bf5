"""Answers FAKE_ANSWERS requests (1 if unset), then reads on and answers nothing."""

import os

from frames import reply, requests

left = int(os.environ.get("FAKE_ANSWERS", "1"))
for request in requests():
    if left > 0:
        left -= 1
        reply(request)
