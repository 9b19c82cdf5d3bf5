"""Never reads, never answers, writes its pid to FAKE_FILE."""

import os
import time

with open(os.environ["FAKE_FILE"], "w") as file:
    file.write(str(os.getpid()))
time.sleep(600)
