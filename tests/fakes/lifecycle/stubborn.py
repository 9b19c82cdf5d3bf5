"""Answers well, but ignores the end of its input and SIGTERM, and has a child that does so too."""

import os
import signal
import time

from frames import reply, requests

signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child == 0:
    os.closerange(0, 3)
    time.sleep(600)
try:
    for request in requests():
        reply(request, {"child": child})
except SystemExit:
    time.sleep(600)
