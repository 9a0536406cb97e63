"""Settings for all tests: one thread, so that timings and reductions do not depend on the machine's load.

Ctrl-C is what it is at a prompt: a shell lets what it runs in the background ignore it, and that is inherited. Latency
tables go to a folder of this run, so that no test reads or writes those of the user.
"""

import os
import signal
import tempfile

import torch
from hypothesis import settings

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("rankopt", deadline=None)
settings.load_profile("rankopt")
_cache = tempfile.TemporaryDirectory(prefix="rankopt-tests-")
os.environ["RANKOPT_CACHE"] = _cache.name
