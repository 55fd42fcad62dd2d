"""The seed of a test run: fresh each time, printed, and repeated by SNELL_TEST_SEED."""

import os

SEED = int(os.environ.get("SNELL_TEST_SEED") or int.from_bytes(os.urandom(3), "big"))
