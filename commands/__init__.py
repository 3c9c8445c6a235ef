"""The top floor: one file for each thing a user asks for. `make` calls them; nothing imports them."""

import os

# Read when torch loads OpenMP: a thread that waits for others looks again some microseconds, then sleeps. By default it
# would burn the processor that the other threads, or other programs, need to get on.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
