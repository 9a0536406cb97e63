"""WikiText-2 by words: a small language model like GPT-2, and an encoder that fills in words that are masked.

The folder of data is the argument ``root``, else the environment variable RANKOPT_DATA, else ``../shared/data`` beside
the repository; it holds ``wikitext2/`` with train.txt.xz, valid.txt.xz and test.txt.xz. Only the most frequent words
are told apart, all others are ``<unk>``; perplexities are over that vocabulary. The networks are trained on first use
and kept in ``runs/``; ``python studies/wikitext2.py`` does that and nothing else.

Text is cut into windows of one length without overlap. Calibration windows are training text; validation windows come
from the validation text, test windows from the test text.
"""

from __future__ import annotations

import argparse
import lzma
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankopt.batches import Batch
from rankopt.errors import DataError

RUNS = Path(__file__).parent / "runs"
WORDS, CONTEXT = 2048, 64
UNKNOWN, END, MASK = 0, 1, 2
WIDTH, HEADS, DEPTH = 128, 4, 4
MASKED = 0.15


class TextModel(nn.Module):
    """Pre-norm transformer layers of PyTorch between an embedding and a head of the same weights.

    Args:
        causal: every position sees those up to its own (language model), or all (encoder).
        width, heads, depth: of the layers, whose inner width is four times as large.
    """

    def __init__(self, causal: bool, width: int = WIDTH, heads: int = HEADS, depth: int = DEPTH) -> None:
        super().__init__()
        self.causal = causal
        self.words = nn.Embedding(WORDS, width)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.words.weight
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        hidden = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
        self.register_buffer("hidden", hidden, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) to logits (batch, tokens, WORDS)."""
        return self.head(self.states(tokens))

    def states(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) to what the head reads, (batch, tokens, width)."""
        n = tokens.shape[1]
        x = self.words(tokens) + self.positions[:n]
        for layer in self.layers:
            x = layer(x, src_mask=self.hidden[:n, :n] if self.causal else None, is_causal=self.causal)
        return self.norm(x)


def language_model(steps: int = 800, root: str | None = None) -> nn.Module:
    """The trained language model."""
    return _trained("gpt", True, steps, root)


def encoder(steps: int = 500, root: str | None = None) -> nn.Module:
    """The trained encoder."""
    return _trained("encoder", False, steps, root)


def text(calibration: int = 128, validation: int = 64, test: int = 128, root: str | None = None) -> dict[str, Any]:
    """Windows and the words that follow each of their positions."""
    return _splits(_following, calibration, validation, test, root)


def masked_text(
    calibration: int = 256, validation: int = 192, test: int = 384, root: str | None = None
) -> dict[str, Any]:
    """Windows with some words masked, and those words (-1 elsewhere)."""
    return _splits(_masked, calibration, validation, test, root)


def quality(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Minus the perplexity on positions that have a label, so that higher is better."""
    return -perplexity(module, batches)


def perplexity(module: nn.Module, batches: Sequence[Batch]) -> float:
    """exp of the mean negative log-likelihood of the labels."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for part in range(0, len(batch), 32):
                piece = batch.take(slice(part, part + 32))
                logits = module(*piece.args).flatten(0, 1).float()
                labels = piece.labels.flatten()
                total += float(F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum"))
                count += int((labels >= 0).sum())
    return math.exp(total / max(count, 1))


@cache
def _tokens(part: str, root: str | None) -> Tensor:
    vocabulary = _vocabulary(root)
    return torch.tensor([vocabulary.get(word, UNKNOWN) for word in _read(part, root)])


@cache
def _vocabulary(root: str | None) -> dict[str, int]:
    counts = Counter(_read("train", root))
    for word in ("<unk>", "<eos>"):
        counts.pop(word, None)
    most = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 3]
    return {"<unk>": UNKNOWN, "<eos>": END, "<mask>": MASK} | {word: n + 3 for n, word in enumerate(most)}


@cache
def _read(part: str, root: str | None) -> list[str]:
    repository = Path(__file__).resolve().parent.parent
    folder = Path(root or os.environ.get("RANKOPT_DATA") or repository.parent / "shared" / "data")
    path = folder / "wikitext2" / f"{part}.txt.xz"
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; set RANKOPT_DATA to the folder that holds wikitext2/")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    return [word for line in lines for word in (*line.split(), "<eos>")]


def _following(part: str, root: str | None) -> tuple[Tensor, Tensor]:
    tokens = _tokens(part, root)
    count = (len(tokens) - 1) // CONTEXT
    used = tokens[: count * CONTEXT + 1]
    return used[:-1].reshape(count, CONTEXT), used[1:].reshape(count, CONTEXT)


def _masked(part: str, root: str | None) -> tuple[Tensor, Tensor]:
    windows, _ = _following(part, root)
    return _hide(windows, torch.Generator().manual_seed(0))


def _hide(windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    hidden = (torch.rand(windows.shape, generator=generator) < MASKED) & (windows > MASK)
    return windows.masked_fill(hidden, MASK), windows.masked_fill(~hidden, -1)


def _splits(make: Any, calibration: int, validation: int, test: int, root: str | None) -> dict[str, Any]:
    x, y = make("train", root)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    calibrating, training = order[:calibration], order[:8192]
    held, tests = make("valid", root), make("test", root)
    return {
        "calibration": (x[calibrating], y[calibrating]),
        "validation": tuple(t[:validation] for t in held),
        "test": tuple(t[:test] for t in tests),
        "train": (x[training], y[training]),
    }


def _trained(name: str, causal: bool, steps: int, root: str | None) -> nn.Module:
    """The network from ``runs/``, or trained: one file a way of training and version of torch."""
    version = torch.__version__.split("+")[0]
    path = RUNS / f"wikitext2-{name}-{WORDS}-{WIDTH}x{DEPTH}-{steps}-torch{version}.safetensors"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net = TextModel(causal)
        if not path.is_file():
            _train(net, steps, root)
            RUNS.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            save_file({k: v for k, v in net.state_dict().items() if k != "head.weight"}, part)
            part.replace(path)  # complete or not there at all
    net.load_state_dict(load_file(path) | {"head.weight": load_file(path)["words.weight"]})
    return net.eval()


def _train(net: TextModel, steps: int, root: str | None, batch: int = 32) -> None:
    """AdamW, one cycle, in bfloat16 where the processor has it."""
    tokens, start = _tokens("train", root), time.perf_counter()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    net.train()
    generator, span = torch.Generator().manual_seed(0), torch.arange(CONTEXT)
    for step in range(1, steps + 1):
        begin = torch.randint(len(tokens) - CONTEXT, (batch, 1), generator=generator)
        x, y = tokens[begin + span], tokens[begin + span + 1]
        if not net.causal:
            x, y = _hide(x, generator)
        labels = y.flatten()
        shown = labels >= 0
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.mkldnn.is_available()):
            logits = net.head(net.states(x).flatten(0, 1)[shown])
        loss = F.cross_entropy(logits.float(), labels[shown])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(
                f"step {step}/{steps}  loss {float(loss.detach()):.3f}  {time.perf_counter() - start:.0f} s", flush=True
            )


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="?", choices=("language_model", "encoder"), default="language_model")
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    make, data = (language_model, text) if given.which == "language_model" else (encoder, masked_text)
    net = make(**({} if given.steps is None else {"steps": given.steps}))
    for part in ("validation", "test"):
        x, y = data(validation=10**6, test=10**6)[part]
        print(f"{given.which}: perplexity on {len(x)} {part} windows {perplexity(net, [Batch((x,), {}, y)]):.1f}")


if __name__ == "__main__":
    _main()
