"""How the cost of attention and of what can stand in its place grows with the number of tokens.

::

    python benchmarks/attention_scaling.py --record

One layer of 128 channels and 4 heads on one sample. MACs are counted by running the layer (PyTorch's counter); times
are medians of interleaved rounds in PyTorch, one thread. The exponent is the slope of log time over log tokens across
the last two doublings: 1 is linear, 2 quadratic.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from machine import headed, write_record
from torch import Tensor, nn

from rankopt.cost import count
from rankopt.nn.attention import Attention
from rankopt.nn.factor_mixing import NmfMixing, NtfMixing, PnmfMixing
from rankopt.nn.nystrom import Nystrom

RECORD = Path(__file__).parent.parent / "studies" / "records" / "attention_scaling.md"
CHANNELS, HEADS = 128, 4
TOKENS = (64, 256, 1024, 4096)
RANK, STEPS, LANDMARKS = 16, 3, 32


def layers(tokens: int) -> dict[str, nn.Module]:
    """Dense attention, smaller heads, and the layers that mix tokens otherwise."""
    size, side = CHANNELS // HEADS, math.isqrt(tokens)

    def linears(inner: int, back: int = CHANNELS) -> tuple[nn.Linear, nn.Linear]:
        return nn.Linear(CHANNELS, inner), nn.Linear(back, CHANNELS)

    half = size // 2
    start = torch.randn
    return {
        "dense attention": Attention(*linears(3 * CHANNELS), HEADS, size, size, size**-0.5),
        "heads of half the size": Attention(*linears(HEADS * 3 * half, HEADS * half), HEADS, half, half, size**-0.5),
        f"Nyström, {LANDMARKS} landmarks": Nystrom(*linears(3 * CHANNELS), HEADS, LANDMARKS, size**-0.5),
        f"NMF, rank {RANK}, {STEPS} steps": NmfMixing(*linears(CHANNELS), RANK, STEPS, start(RANK, CHANNELS)),
        f"projective NMF, rank {RANK}, {STEPS} steps": PnmfMixing(
            *linears(CHANNELS), RANK, STEPS, start(CHANNELS, RANK)
        ),
        f"NTF (tokens, heads, channels), rank {RANK}, {STEPS} steps": NtfMixing(
            *linears(CHANNELS), RANK, STEPS, start(size + HEADS, RANK), (HEADS, size)
        ),
        f"NTF (height, width, channels), rank {RANK}, {STEPS} steps": NtfMixing(
            *linears(CHANNELS), RANK, STEPS, start(2 * side + CHANNELS, RANK), (side, side, CHANNELS)
        ),
    }


def medians(modules: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, float]:
    """Milliseconds of each, by rounds through all of them until the time is up."""
    taken: dict[str, list[float]] = {name: [] for name in modules}
    with torch.no_grad():
        for module in modules.values():
            module(x)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(next(iter(taken.values()))) < 5:
            for name, module in modules.items():
                start = time.perf_counter()
                module(x)
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(times)[len(times) // 2] for name, times in taken.items()}


def main() -> None:
    """Measure all token counts and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the record")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring for every number of tokens")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    macs: dict[str, list[int]] = {}
    times: dict[str, list[float]] = {}
    for tokens in TOKENS:
        x = torch.randn(1, tokens, CHANNELS)
        modules = {name: module.eval() for name, module in layers(tokens).items()}
        found = medians(modules, x, given.seconds)
        for name, module in modules.items():
            macs.setdefault(name, []).append(count(module, x).macs)
            times.setdefault(name, []).append(found[name])
    doublings = math.log(TOKENS[-1] / TOKENS[-2])
    lines = headed(
        "Cost of attention and its replacements over the number of tokens",
        f"One layer, {CHANNELS} channels, {HEADS} heads, one sample. MACs as counted by running the layer, "
        "and milliseconds (median) in PyTorch.",
    )
    columns = [f"{t:,} tokens" for t in TOKENS]
    lines += ["| layer | " + " | ".join(columns) + " | exponent of MACs | exponent of time |"]
    lines += ["|---" * (len(TOKENS) + 3) + "|"]
    for name in macs:
        cells = [f"{m / 1e6:.1f} M, {t:.2f} ms" for m, t in zip(macs[name], times[name], strict=True)]
        slopes = [math.log(values[-1] / values[-2]) / doublings for values in (macs[name], times[name])]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {slopes[0]:.2f} | {slopes[1]:.2f} |")
    write_record(lines, RECORD if given.record else None)


if __name__ == "__main__":
    main()
