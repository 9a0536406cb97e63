"""A small pretrained language model that tells stories: Llama-like, 260,000 parameters, its output tied to its table.

The folder of data is the argument ``root``, else RANKOPT_DATA, else ``../shared/data`` beside the repository. It holds
``text/``: stories260K.bin (seven numbers, then weights as llama2.c stores them), tok512.bin (the vocabulary) and
tinystories_sample.txt, stories with a line <|endoftext|> between them.

Calibration and validation texts are drawn from the model itself, so no text is used up; test are the real stories. Your
own take their place by the argument ``text``, the path of a file like the sample.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.errors import DataError

IGNORED = -1
START = 1
HEADER = ("dim", "hidden", "layers", "heads", "kv_heads", "vocabulary", "context")


class Norm(nn.Module):
    """Root mean square norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, over the last dimension."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


class Attention(nn.Module):
    """Causal, with fewer heads for keys and values than for queries, positions by rotation."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, dim // heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * self.size, bias=False)
        self.v = nn.Linear(dim, kv_heads * self.size, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """(n, tokens, dim) to the same."""
        q, k, v = (
            y.unflatten(-1, (heads, self.size)).transpose(1, 2)
            for y, heads in ((self.q(x), self.heads), (self.k(x), self.kv_heads), (self.v(x), self.kv_heads))
        )
        q, k = _turned(q, cosine, sine), _turned(k, cosine, sine)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a gated feed-forward net, each behind a norm."""

    def __init__(self, dim: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.norm, self.attention = Norm(dim), Attention(dim, heads, kv_heads)
        self.ffn_norm = Norm(dim)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """(n, tokens, dim) to the same."""
        x = x + self.attention(self.norm(x), cosine, sine)
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Storyteller(nn.Module):
    """Token numbers to logits of the next token."""

    cosine: Tensor
    sine: Tensor

    def __init__(
        self, dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int, context: int
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(Layer(dim, hidden, heads, kv_heads) for _ in range(layers))
        self.norm = Norm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.table.weight
        size = dim // heads
        angle = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens) to (n, tokens, vocabulary)."""
        x, length = self.table(tokens), tokens.shape[1]
        for layer in self.layers:
            x = layer(x, self.cosine[:length], self.sine[:length])
        return self.head(self.norm(x))


def storyteller(root: str | None = None) -> nn.Module:
    """Pretrained; 1.27 nats a token on the sample."""
    raw = _file("stories260K.bin", root).read_bytes()
    sizes = dict(zip(HEADER, struct.unpack("7i", raw[:28]), strict=True))
    net = Storyteller(**sizes)
    numbers, at = np.frombuffer(raw, dtype=np.float32, offset=28), 0
    layers: Any = net.layers

    def fill(parameters: Sequence[nn.Parameter]) -> None:
        nonlocal at
        for parameter in parameters:
            count = parameter.numel()
            parameter.copy_(torch.from_numpy(numbers[at : at + count].copy()).reshape(parameter.shape))
            at += count

    with torch.no_grad():
        fill([net.table.weight])
        fill([layer.norm.weight for layer in layers])
        for name in ("q", "k", "v", "o"):
            fill([getattr(layer.attention, name).weight for layer in layers])
        fill([layer.ffn_norm.weight for layer in layers])
        for name in ("w1", "w2", "w3"):
            fill([getattr(layer, name).weight for layer in layers])
        fill([net.norm.weight])
    return net.eval()


def data(
    root: str | None = None, text: str | None = None, calibration: int = 48, validation: int = 32, length: int = 48
) -> dict[str, Callable[[], Any]]:
    """Tokens and the ones that follow, (n, tokens) both; -1 where none follows."""
    return {
        "calibration": lambda: _pairs(_told(storyteller(root), calibration, length, 0)),
        "validation": lambda: _pairs(_told(storyteller(root), validation, length, 1)),
        "test": lambda: _pairs(_stories(Path(text) if text else _file("tinystories_sample.txt", root), root)),
    }


def mean_nats(module: nn.Module, batches: Sequence[Any]) -> float:
    """Minus the nats a token, so that higher is better; exp(-mean_nats) is the perplexity."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits, wanted = module(*batch.args, **batch.kwargs), batch.labels
            total += float(
                F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
            )
            count += int((wanted != IGNORED).sum())
    return -total / max(count, 1)


def encode(line: str, root: str | None = None) -> list[int]:
    """Token numbers after the start token: characters, merged greedily by the vocabulary's scores."""
    pieces, scores = _vocabulary(root)
    number = {piece: n for n, piece in reversed(list(enumerate(pieces)))}
    tokens: list[int] = []
    for character in " " + line:
        known = number.get(character.encode())
        tokens += [known] if known is not None else [byte + 3 for byte in character.encode()]
    while True:
        joined = [(number.get(pieces[a] + pieces[b]), n) for n, (a, b) in enumerate(pairwise(tokens))]
        known_ones = [(scores[found], -n, found) for found, n in joined if found is not None]
        if not known_ones:
            return [START, *tokens]
        _, place, found = max(known_ones)
        tokens[-place : -place + 2] = [found]


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)


def _told(net: nn.Module, count: int, length: int, seed: int) -> list[list[int]]:
    """Stories that the model tells itself."""
    generator, tokens = torch.Generator().manual_seed(seed), torch.full((count, 1), START)
    with torch.no_grad():
        for _ in range(length):
            chances = net(tokens)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    return tokens.tolist()


def _stories(path: Path, root: str | None) -> list[list[int]]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    told = [story.strip() for story in path.read_text(encoding="utf-8").split("<|endoftext|>")]
    return [encode(story, root)[:512] for story in told if story]


def _pairs(stories: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, stories)) - 1
    x, y = torch.zeros(len(stories), longest, dtype=torch.int64), torch.full((len(stories), longest), IGNORED)
    for n, story in enumerate(stories):
        x[n, : len(story) - 1], y[n, : len(story) - 1] = torch.tensor(story[:-1]), torch.tensor(story[1:])
    return x, y


def _vocabulary(root: str | None) -> tuple[list[bytes], list[float]]:
    raw, at = _file("tok512.bin", root).read_bytes(), 4
    pieces, scores = [], []
    while at < len(raw):
        score, size = struct.unpack("fi", raw[at : at + 8])
        pieces.append(raw[at + 8 : at + 8 + size])
        scores.append(score)
        at += 8 + size
    return pieces, scores


def _file(name: str, root: str | None) -> Path:
    repository = Path(__file__).resolve().parent.parent
    folder = Path(root or os.environ.get("RANKOPT_DATA") or repository.parent / "shared" / "data")
    path = folder / "text" / name
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; set RANKOPT_DATA to the folder that holds text/")
    return path
