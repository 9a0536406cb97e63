"""`Contracted`: a linear layer, an embedding or an output head whose weight is a tensor network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.nn.chain import Told
from rankopt.nn.network import Digits, Network


class Contracted(nn.Module):
    """The features are a number's digits: in = (i1, …), out = (o1, …), padded with zeros at the end where needed.

    Args:
        network: from the input's modes to the output's.
        tensors: of the network; parameters are shared with whoever else holds them.
        in_features, out_features: without padding. Input (..., in), output (..., out).
        bias: (out,).
        rebuilt: make the dense weight in every call, and multiply with that: fewer parameters, more arithmetic.
    """

    def __init__(
        self,
        network: Network,
        tensors: Sequence[Tensor],
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        *,
        rebuilt: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.in_features, self.out_features, self.rebuilt = network, in_features, out_features, rebuilt
        self.order = network.dense() if rebuilt else network.rows()
        self.tensors = nn.ParameterList(tensors)
        self.bias = None if bias is None else nn.Parameter(bias)
        self._wide = [math.prod(network.sizes[m] for m in side) for side in (network.inputs, network.outputs)]

    @property
    def weight(self) -> Told:
        """The dtype and device of the layer that was replaced; there is no weight to compute with."""
        return Told(self.tensors[0].dtype, self.tensors[0].device)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.rebuilt:
            return F.linear(x, self.dense(), self.bias)
        flat = x.reshape(math.prod(x.shape[:-1]), self.in_features)
        if self._wide[0] > self.in_features:
            flat = F.pad(flat, (0, self._wide[0] - self.in_features))
        state = flat.reshape(flat.shape[0], *(self.network.sizes[m] for m in self.network.inputs))
        out = self.order.run([state, *self.tensors])
        out = out.reshape(flat.shape[0], self._wide[1])[:, : self.out_features].reshape(
            *x.shape[:-1], self.out_features
        )
        return out if self.bias is None else out + self.bias

    def dense(self) -> Tensor:
        """(out, in): the tensors multiplied together, where it is rebuilt."""
        whole = multiplied(self.network, list(self.tensors))
        return whole[: self.out_features, : self.in_features]

    def extra_repr(self) -> str:
        """Shown by print."""
        return described(self.network) + (", rebuilt" if self.rebuilt else "")


class ContractedEmbedding(nn.Module):
    """A table (num_embeddings, embedding_dim) whose rows are made of slices of the tensors when they are looked up.

    Args:
        network: from the digits of a row number to the modes of a row.
        tensors: of the network.
        num_embeddings, embedding_dim: without padding.
        padding_idx: a row that is zero and gets no gradient.
    """

    def __init__(
        self,
        network: Network,
        tensors: Sequence[Tensor],
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.network, self.order = network, network.lookup()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.digits = Digits([network.sizes[m] for m in network.inputs])
        self.tensors = nn.ParameterList(tensors)

    @property
    def weight(self) -> Told:
        """The dtype and device of the table that was replaced."""
        return Told(self.tensors[0].dtype, self.tensors[0].device)

    def forward(self, input: Tensor) -> Tensor:
        """Row numbers (...) → rows (..., embedding_dim)."""
        flat = input.reshape(-1)
        digits = dict(zip(self.network.inputs, self.digits.of(flat), strict=True))
        out = self.order.run([self._slice(n, digits) for n in range(len(self.tensors))])
        wide = math.prod(self.network.sizes[m] for m in self.network.outputs)
        rows = out.reshape(flat.shape[0], wide)[:, : self.embedding_dim]
        if self.padding_idx is not None:
            rows = rows.masked_fill((flat == self.padding_idx)[:, None], 0)
        return rows.reshape(*input.shape, self.embedding_dim)

    def _slice(self, n: int, digits: dict[str, Tensor]) -> Tensor:
        """(rows, *other modes) of a tensor with input modes, else the tensor itself."""
        modes, tensor = self.network.tensors[n], self.tensors[n]
        own = [m for m in modes if m in self.network.inputs]
        if not own:
            return tensor
        order = [*own, *self.network.others(n)]
        moved = tensor.permute([modes.index(m) for m in order])
        index = digits[own[0]]
        for m in own[1:]:
            index = index * self.network.sizes[m] + digits[m]
        size = math.prod(self.network.sizes[m] for m in own)
        return F.embedding(index, moved.reshape(size, -1)).reshape(-1, *moved.shape[len(own) :])

    def extra_repr(self) -> str:
        """Shown by print."""
        return described(self.network)


def multiplied(network: Network, tensors: Sequence[Tensor]) -> Tensor:
    """The dense weight (outputs, inputs), padding included."""
    whole = network.dense().run(tensors)
    return whole.reshape(math.prod(network.sizes[m] for m in network.outputs), -1)


def described(network: Network) -> str:
    """Sizes of the two sides, for print."""
    sides = ("×".join(str(network.sizes[m]) for m in side) for side in (network.inputs, network.outputs))
    return " to ".join(sides)


def owned(tensor: Tensor) -> nn.Parameter:
    """A parameter of its own memory."""
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))
