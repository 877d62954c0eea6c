"""Mamba on images: the orders in which a layer of `models.scan` goes through the pixels."""

from typing import Literal

from torch import Tensor, nn

from dereflect.models.scan import Mamba, ScanDirection, scan_along

Order = Literal["raster", "bidirectional", "cross"]
DIRECTIONS = {"raster": 1, "bidirectional": 2, "cross": 4}


class ImageMamba(nn.Module):
    """A Mamba layer on the sequence of an image's pixels; (batch, channels, height, width) -> the same.

    Args:
        channels: of the image.
        order: of the pixels. "raster": row by row, so that a pixel knows those before it. "bidirectional": there and
            back (Vim, Zhu et al. 2024). "cross": there and back along the rows and along the columns (VMamba, Liu et
            al. 2024). The directions' results are added between the two projections of the layer.

    Images in channels_last memory are not copied, and the result is in channels_last too. Only the two directions
    along the columns need a transposed copy: once before them, and once after.
    """

    def __init__(self, channels: int, order: Order = "raster") -> None:
        super().__init__()
        self.mamba_model = Mamba(channels)
        self.others = nn.ModuleList(ScanDirection(self.mamba_model) for _ in range(DIRECTIONS[order] - 1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        u, z = self.mamba_model.project_in(x.permute(0, 2, 3, 1).flatten(1, 2))  # (batch, d_inner, height * width)
        y = scan_along(self.mamba_model, u, z)
        if len(self.others) > 0:
            y = y + scan_along(self.others[0], u, z, reverse=True)
        if len(self.others) > 1:
            u, z = (transpose_pixels(t, height) for t in (u, z))
            columns = scan_along(self.others[1], u, z) + scan_along(self.others[2], u, z, reverse=True)
            y = y + transpose_pixels(columns, width)
        return self.mamba_model.project_out(y).unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def transpose_pixels(x: Tensor, rows: int) -> Tensor:
    """(batch, d, length), pixels row by row of an image with `rows` rows, to column by column, in new memory."""
    return x.unflatten(2, (rows, -1)).mT.flatten(2)
