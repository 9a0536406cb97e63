"""Memory is bounded: what is held besides the models keeps to the allowance, whatever the number of layers.

`benchmarks/memory_1b.py` shows it for a billion parameters; here the same script runs at a size that takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_space import seeds
from torch import nn

import rankopt
from rankopt.batches import Batch
from rankopt.calibration import CalibrationOptions
from rankopt.candidates import default_memory
from rankopt.errors import InputError
from rankopt.limits import parse_limit
from rankopt.search import Search

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "memory_1b.py"


def stack(layers: int = 8, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)), nn.Linear(width, 8))


def search(memory: int | None, samples: int = 48) -> Search:
    torch.manual_seed(1)
    batches = [Batch((torch.randn(16, 64),)) for _ in range(samples // 16)]
    return Search(
        stack(),
        torch.randn(1, 64),
        calibration=batches,
        validation=batches[:1],
        limits=[parse_limit("macs<=50%")],
        space={"methods": ["svd"], "keep": [0.25, 0.5]},
        options=CalibrationOptions(fisher_samples=8, draws=1),
        memory=memory,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")
def test_the_resident_set_does_not_grow_with_the_number_of_layers() -> None:
    """24 layers of 512 × 512: unbounded, their statistics and factors take 200 MiB; the allowance is 16 MiB.

    Everything else that is loaded or held for a while has to fit what is added to the weights.
    """
    command = [sys.executable, str(BENCHMARK), "--json", "--layers", "24", "--width", "512"]
    command += ["--samples", "64", "--trials", "1", "--memory", "16"]
    # Larger blocks go back to the operating system when they are freed, so that the resident set is what is in use.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.startswith("{"), done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["layers"] == 24
    assert found["best"]["macs_kept"] <= 0.5
    growth = found["peak_mib"] - found["loaded_mib"]
    assert growth < found["weights_mib"] + 96, found["phases"]


@pytest.mark.parametrize("memory", [0, 2**17, 2**20])
def test_caches_keep_to_their_share(memory: int) -> None:
    run = search(memory)
    factors = run._prepared[1]
    assert len(run.groups) == 9
    one_layer = 8 * 3 * 64 * 64  # two factors and a spectrum in float64
    assert factors._spool.held_bytes <= max(memory // 4, one_layer)


def test_the_plans_do_not_depend_on_the_memory() -> None:
    tight, ample = search(0), search(2**30)
    tight.refit_options = ample.refit_options = None  # how much is refitted does depend on it
    for a, b in zip(tight.groups, ample.groups, strict=True):
        assert a.choices == b.choices
        assert a.losses == pytest.approx(b.losses, rel=1e-4, abs=1e-9)
    neutral = seeds(tight.space, 3)
    assert [tight.space.plan_of(s).digest for s in neutral] == [ample.space.plan_of(s).digest for s in neutral]


def test_the_refit_fits_fewer_positions_in_less_memory() -> None:
    width = 8 * 64 + 8
    rows = {memory: search(memory).evaluator.refit for memory in (20 * 8 * width, 2**30)}
    held = {
        m: sum(t.numel() * 4 for parts in refit._targets.values() for t in parts) for m, refit in rows.items() if refit
    }
    assert held[2**30] == 48 * 4 * width
    assert held[20 * 8 * width] == 20 * 4 * width


def test_the_default_grows_with_the_model() -> None:
    assert default_memory(stack()) == 2**30
    with torch.device("meta"):
        large = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(20)))
    assert default_memory(large) == 20 * 8192 * 8192


@pytest.mark.parametrize("memory", [-1, 1.5, "1 GiB", True])
def test_the_allowance_is_a_whole_number(memory: Any) -> None:
    x = torch.randn(8, 64)
    with pytest.raises(InputError, match="memory: must be a whole number from 0"):
        rankopt.search(stack(), x[:1], calibration=x, memory=memory)
