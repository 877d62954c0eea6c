"""Pictures of test images, as a run shows them."""

import numpy as np
import torch

from dereflect.util.evaluation import Separated
from dereflect.util.run.panels import draw


def test_every_row_has_its_tiles_below_a_line_of_text():
    grey = torch.full((3, 40, 120), 0.5)
    layers = [grey, grey * 0, grey, grey, grey, grey * 0]  # mixture, T, R, residue, targets of T and R
    picture = draw([Separated(name, *layers) for name in ("a", "b")])
    assert picture.shape == (14 + 2 * (40 + 14 + 8), 6 * 128, 3)
    columns = [picture[28:68, left : left + 120] for left in range(0, 6 * 128, 128)]
    means = [float(column.mean()) for column in columns]
    np.testing.assert_allclose(means, [0.5, 0, 0.5, 0.5, 0, 0.75], atol=0.01)
    for top, lefts in ((0, range(0, 768, 128)), (14, (0, 128)), (76, (0, 128))):
        assert all(picture[top : top + 14, left : left + 60].min() < 0.5 for left in lefts), "text"
