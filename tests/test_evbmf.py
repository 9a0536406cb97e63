"""Ranks out of noise, against matrices whose rank is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankopt.candidates import Group
from rankopt.decompositions import method
from rankopt.evbmf import estimated_share, evbmf_rank
from rankopt.factors import Factors
from rankopt.layers import find_layers


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 12), st.integers(30, 80), st.integers(60, 200), st.floats(0.01, 0.3), st.integers(0, 10**6))
def test_the_rank_of_a_matrix_in_noise(rank: int, rows: int, columns: int, noise: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    signal = random.standard_normal((rows, rank)) @ random.standard_normal((rank, columns))
    found = evbmf_rank(signal + noise * random.standard_normal((rows, columns)))
    assert found == rank
    assert evbmf_rank((signal + noise * random.standard_normal((rows, columns))).T) == rank


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3), (0, 4)])
def test_small_and_empty_matrices(shape: tuple[int, int]) -> None:
    assert evbmf_rank(np.zeros(shape)) == 0
    assert 0 <= evbmf_rank(np.random.default_rng(0).standard_normal(shape)) <= min(shape)


def test_the_scale_does_not_matter() -> None:
    random = np.random.default_rng(1)
    y = random.standard_normal((20, 4)) @ random.standard_normal((4, 50)) + 0.2 * random.standard_normal((20, 50))
    assert evbmf_rank(y) == evbmf_rank(1e4 * y) == evbmf_rank(1e-6 * y) == 4


@pytest.mark.parametrize("name", ["svd", "tucker2"])
def test_the_share_of_macs_at_the_estimated_ranks(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(24, 32, 3, padding=1))
    with torch.no_grad():
        low = torch.einsum("or,rikl->oikl", torch.randn(32, 5), torch.randn(5, 24, 3, 3))
        net[0].weight.copy_(low + 0.01 * torch.randn_like(low))
    (layer,) = find_layers(net, torch.randn(1, 24, 8, 8))
    group = Group((layer,), (), np.zeros(0), np.zeros(0), np.zeros(0))
    by_input = low.transpose(0, 1).flatten(1).numpy()  # of rank 24, some of it as weak as noise
    ranks = {"rank": 5} if name == "svd" else {"rank_out": 5, "rank_in": evbmf_rank(by_input)}
    assert estimated_share(group, name, Factors(net)) == method(name).macs(layer, ranks) / layer.macs
