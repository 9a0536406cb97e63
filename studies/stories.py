"""Children's stories: a pretrained language model of 260,000 parameters, built like Llama, whose output head is tied.

The folder of data is the argument ``root``, else the environment variable RANKOPT_DATA, else ``../shared/data`` beside
the repository; it holds ``text/`` with stories260K.bin, tok512.bin (both as llama2.c writes them) and
tinystories_sample.txt. Calibration and validation texts are told by the model itself, and kept in ``runs/``; the test
text is five stories that were written by others, each from a fresh context. ``python studies/stories.py`` prints the
dense perplexity on them.
"""

from __future__ import annotations

import math
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankopt.errors import DataError

RUNS = Path(__file__).parent / "runs"
BEGIN, IGNORED = 1, -100
TOLD, LENGTH = 96, 96  # stories that the model tells, and their tokens


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(…, width), the same."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    """Causal self-attention with rotated queries and keys; several heads share keys and values."""

    def __init__(self, width: int, heads: int, shared: int, context: int) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, width // heads
        self.wq = nn.Linear(width, heads * self.size, bias=False)
        self.wk = nn.Linear(width, shared * self.size, bias=False)
        self.wv = nn.Linear(width, shared * self.size, bias=False)
        self.wo = nn.Linear(heads * self.size, width, bias=False)
        steps = 10000.0 ** (-torch.arange(0, self.size, 2) / self.size)
        angles = torch.arange(context)[:, None] * steps
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width), the same."""
        q = self._rotated(self.wq(x), self.heads)
        k = self._rotated(self.wk(x), self.shared).repeat_interleave(self.heads // self.shared, 1)
        v = self._split(self.wv(x), self.shared).repeat_interleave(self.heads // self.shared, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.size)).transpose(1, 2)

    def _rotated(self, x: Tensor, heads: int) -> Tensor:
        even, odd = self._split(x, heads).unflatten(-1, (-1, 2)).unbind(-1)
        cosines, sines = self.cosines[: x.shape[1]], self.sines[: x.shape[1]]
        return torch.stack((even * cosines - odd * sines, even * sines + odd * cosines), -1).flatten(-2)


class Block(nn.Module):
    """Attention, then a gated feed-forward layer."""

    def __init__(self, width: int, hidden: int, heads: int, shared: int, context: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(width), Attention(width, heads, shared, context)
        self.norm = Norm(width)
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width), the same."""
        x = x + self.attention(self.attention_norm(x))
        y = self.norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Llama(nn.Module):
    """Tokens (batch, tokens) to logits (batch, tokens, vocabulary)."""

    def __init__(
        self, width: int, hidden: int, depth: int, heads: int, shared: int, vocabulary: int, context: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, hidden, heads, shared, context) for _ in range(depth))
        self.norm, self.head = Norm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def model(root: str | None = None) -> nn.Module:
    """The pretrained model."""
    raw = _path("stories260K.bin", root).read_bytes()
    width, hidden, depth, heads, shared, vocabulary, context = struct.unpack("<7i", raw[:28])
    net = Llama(width, hidden, depth, heads, shared, abs(vocabulary), context)
    values = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy())
    blocks: Any = net.layers
    rows = [
        [net.tokens.weight],
        [b.attention_norm.weight for b in blocks],
        *([getattr(b.attention, name).weight for b in blocks] for name in ("wq", "wk", "wv", "wo")),
        [b.norm.weight for b in blocks],
        *([getattr(b, name).weight for b in blocks] for name in ("w1", "w2", "w3")),
        [net.norm.weight],
    ]
    at = 0
    with torch.no_grad():
        for parameter in (p for row in rows for p in row):
            parameter.copy_(values[at : at + parameter.numel()].reshape(parameter.shape))
            at += parameter.numel()
    return net.eval()


def data(root: str | None = None, samples: int = TOLD) -> dict[str, Any]:
    """Inputs and the tokens that follow; padding of the test text is ignored."""
    path = RUNS / f"stories-told-{samples}-{LENGTH}.safetensors"
    if path.is_file():
        told = load_file(path)["tokens"]
    else:
        told = _told(model(root), samples)
        RUNS.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        save_file({"tokens": told}, part)
        part.replace(path)
    third = samples // 3
    return {
        "calibration": (told[third:, :-1], told[third:, 1:]),
        "validation": (told[:third, :-1], told[:third, 1:]),
        "test": _test(root),
    }


def negative_nats(net: nn.Module, batches: Any) -> float:
    """Minus the mean cross-entropy of the next token: a metric, of which higher is better."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits = net(*batch.args, **batch.kwargs).flatten(0, -2)
            labels = batch.labels.flatten()
            total += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            count += int((labels != IGNORED).sum())
    return -total / count


def _told(net: nn.Module, samples: int) -> Tensor:
    """Stories that the model tells, (samples, LENGTH)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((samples, 1), BEGIN)
    with torch.no_grad():
        while tokens.shape[1] < LENGTH:
            following = net(tokens)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(following, 1, generator=generator)], 1)
    return tokens


def _test(root: str | None) -> tuple[Tensor, Tensor]:
    text = _path("tinystories_sample.txt", root).read_text(encoding="utf-8")
    pieces = _pieces(root)
    stories = [[BEGIN, *_encoded(s.strip(), pieces)] for s in text.split("<|endoftext|>") if s.strip()]
    longest = max(map(len, stories)) - 1
    inputs = torch.zeros(len(stories), longest, dtype=torch.long)
    following = torch.full((len(stories), longest), IGNORED)
    for n, story in enumerate(stories):
        inputs[n, : len(story) - 1] = torch.tensor(story[:-1])
        following[n, : len(story) - 1] = torch.tensor(story[1:])
    return inputs, following


def _pieces(root: str | None) -> dict[bytes, tuple[int, float]]:
    """Piece of text → its token, and how early it is merged."""
    raw, at = _path("tok512.bin", root).read_bytes(), 4
    found: dict[bytes, tuple[int, float]] = {}
    while at < len(raw):
        score, length = struct.unpack("<fi", raw[at : at + 8])
        piece = raw[at + 8 : at + 8 + length]
        found.setdefault(piece, (len(found), score))
        at += 8 + length
    return found


def _encoded(text: str, pieces: dict[bytes, tuple[int, float]]) -> list[int]:
    """Byte pair encoding: neighbours whose union is a piece are merged, the best first; unknown bytes are 3 + byte."""
    parts = [c.encode() for c in f" {text}"]
    while True:
        pairs = ((pieces[a + b][1], -n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in pieces)
        best = max(pairs, default=None)
        if best is None:
            break
        n = -best[1]
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return [token for p in parts for token in ([pieces[p][0]] if p in pieces else [3 + byte for byte in p])]


def _path(name: str, root: str | None) -> Path:
    repository = Path(__file__).resolve().parent.parent
    path = Path(root or os.environ.get("RANKOPT_DATA") or repository.parent / "shared" / "data") / "text" / name
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; set RANKOPT_DATA to the folder that holds text/")
    return path


if __name__ == "__main__":
    from rankopt.batches import as_batches

    nats = -negative_nats(model(), as_batches(_test(None)))
    print(f"dense: {nats:.4f} nats a token, perplexity {math.exp(nats):.3f}")
