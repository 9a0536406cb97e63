"""Settings for all tests: one thread, so that timings and reductions do not depend on the machine's load."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("rankopt", deadline=None)
settings.load_profile("rankopt")
