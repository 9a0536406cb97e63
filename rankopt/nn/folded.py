"""`Folded`: one convolution whose kernel several blocks of channels share."""

from __future__ import annotations

from torch import Tensor, nn


class Folded(nn.Module):
    """Apply `conv` to each of `copies` channel blocks with the same kernel, by folding them into the batch.

    Channels run as (groups, copies, channel): input (N, groups·copies·a, *size) or the same without N,
    output (N, groups·copies·b, *size'), for a `conv` from groups·a to groups·b channels.
    """

    def __init__(self, conv: nn.Module, copies: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = conv
        self.copies = copies
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        dims = len(self.conv.kernel_size)  # type: ignore[arg-type]
        batched = x if x.dim() == dims + 2 else x.unsqueeze(0)
        n, size = batched.shape[0], batched.shape[2:]
        a = batched.shape[1] // (self.groups * self.copies)
        blocks = batched.reshape(n, self.groups, self.copies, a, *size).transpose(1, 2)
        y = self.conv(blocks.reshape(n * self.copies, self.groups * a, *size))
        b = y.shape[1] // self.groups
        y = y.reshape(n, self.copies, self.groups, b, *y.shape[2:]).transpose(1, 2)
        y = y.reshape(n, self.groups * self.copies * b, *y.shape[4:])
        return y if x.dim() == dims + 2 else y.squeeze(0)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"copies={self.copies}, groups={self.groups}"
