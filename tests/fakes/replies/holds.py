"""Answers `hold` only once the file FAKE_FILE is there; everything else at once."""

import os
import threading
import time

from frames import reply, requests

held = []
free = threading.Event()
lock = threading.Lock()


def let_go():
    while not os.path.exists(os.environ["FAKE_FILE"]):
        time.sleep(0.01)
    with lock:
        free.set()
        for request in held:
            reply(request)


threading.Thread(target=let_go, daemon=True).start()
for request in requests():
    with lock:
        if request["command"] == "hold" and not free.is_set():
            held.append(request)
        else:
            reply(request)
