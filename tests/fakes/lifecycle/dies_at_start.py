"""Says FAKE_SAYS on standard error, if it is set, and dies before it reads anything, with exit status 3."""

import os
import sys

if "FAKE_SAYS" in os.environ:
    sys.stderr.write(f"{os.environ['FAKE_SAYS']}\n")
sys.exit(3)
