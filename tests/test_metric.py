"""The metric against sums over explicit data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankopt.decompositions.metric import Metric, root


def moment(*size: int, samples: int = 30) -> Tensor:
    """A batch of second moments of random data; the last size is the side."""
    data = torch.randn(*size, samples, dtype=torch.float64)
    return data @ data.mT / samples


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("groups", [1, 2])
def test_error_is_the_mean_output_error_on_the_data(groups: int) -> None:
    x = F.avg_pool2d(torch.randn(3, 4 * groups, 10, 9, dtype=torch.float64), 3, 1)
    difference = torch.randn(groups, 5, 4, 3, 2, dtype=torch.float64)
    out = F.conv2d(x, difference.flatten(0, 1), stride=(2, 1), padding=1, dilation=(1, 2), groups=groups)
    patches = F.unfold(x, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2))
    patches = patches.reshape(3, groups, -1, patches.shape[-1]).permute(1, 2, 0, 3).flatten(2)
    metric = Metric(patch=patches @ patches.mT / patches.shape[-1])
    measured = out.square().sum() / (out.numel() / out.shape[1])
    torch.testing.assert_close(metric.error(difference), measured)


def test_output_moment_is_that_of_the_output() -> None:
    x, weight = torch.randn(50, 6, dtype=torch.float64), torch.randn(1, 4, 6, dtype=torch.float64)
    out = x @ weight[0].T
    metric = Metric(patch=(x.T @ x / 50)[None])
    torch.testing.assert_close(metric.output_moment(weight)[0], out.T @ out / 50)


def test_channel_moment_is_the_patch_moment_of_uncorrelated_positions() -> None:
    channel, weight = moment(2, 5), torch.randn(2, 4, 5, 3, 2, dtype=torch.float64)
    patch = torch.stack([torch.kron(c, torch.eye(6, dtype=c.dtype)) for c in channel])
    by_channel, by_patch = Metric(channel=channel), Metric(patch=patch)
    torch.testing.assert_close(by_channel.output_moment(weight), by_patch.output_moment(weight))
    torch.testing.assert_close(by_channel.weighted(weight), by_patch.weighted(weight))
    for keep in ((0,), (0, 1), (0, 1, 2)):
        torch.testing.assert_close(by_channel.over_modes((5, 3, 2), keep), by_patch.over_modes((5, 3, 2), keep))
    assert by_channel.over_modes((5, 3, 2), (1,)) is None
    assert Metric().over_modes((5, 3, 2), (0,)) is None


@pytest.mark.parametrize("keep", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_over_modes_averages_the_other_modes(keep: tuple[int, ...]) -> None:
    shape = (3, 2, 4)
    data = torch.randn(2, 24, 40, dtype=torch.float64)
    metric = Metric(patch=data @ data.mT / 40)
    rest = [m for m in range(3) if m not in keep]
    # The mean over the other modes and the samples of the outer products of what is kept.
    arranged = data.reshape(2, *shape, 40).permute(0, *(m + 1 for m in keep), *(m + 1 for m in rest), 4)
    n = torch.Size(shape[m] for m in keep).numel()
    columns = arranged.reshape(2, n, -1)
    torch.testing.assert_close(metric.over_modes(shape, keep), columns @ columns.mT / columns.shape[-1])


def test_no_statistics_are_the_frobenius_norm() -> None:
    difference = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(Metric().error(difference), difference.square().sum())
    assert not Metric().known
    assert not Metric(gradient=moment(1, 3)).known
    assert Metric(channel=moment(1, 3)).known


def test_root_is_a_root_up_to_scale_and_ridge() -> None:
    given = moment(2, 6) * 7
    half, inverse = root(given, 6, torch.empty(2, 0, dtype=torch.float64))
    scaled = given / given.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    torch.testing.assert_close(half @ half, scaled + 1e-6 * torch.eye(6, dtype=half.dtype))
    torch.testing.assert_close(half @ inverse, torch.eye(6, dtype=half.dtype).expand(2, 6, 6))
    torch.testing.assert_close(half, half.mT)


def test_root_of_nothing_and_of_zero() -> None:
    like = torch.empty(2, 0)
    half, inverse = root(None, 4, like)
    assert torch.equal(half, torch.eye(4).expand(2, 4, 4))
    assert torch.equal(half, inverse)
    half, inverse = root(torch.zeros(2, 4, 4), 4, like)
    torch.testing.assert_close(half @ inverse, torch.eye(4).expand(2, 4, 4))


def test_root_of_a_moment_that_lacks_rank_is_finite() -> None:
    half, inverse = root(moment(1, 8, samples=3), 8, torch.empty(1, 0))
    assert half.dtype == torch.float32
    assert torch.isfinite(half).all()
    assert torch.isfinite(inverse).all()
    assert float(inverse.abs().max()) <= 1.01e3
