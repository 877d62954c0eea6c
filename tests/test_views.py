"""The views of an image that a network is shown: which they are, what comes of them, and where they are stated."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from dereflect.models import views
from dereflect.models.arch import create_model
from dereflect.models.separator import Separator, load_separator
from dereflect.tools import export, infer
from dereflect.util import program
from dereflect.util.errors import UserError
from dereflect.util.images import read_image, write_image
from tests.helpers import Local

SIDES = (96, 64)


class Veiled(nn.Module):
    """Stands in for a model that takes away a veil, whatever the image: half of its mean."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))
        self.seen = []

    @torch.no_grad()
    def predict(self, image, part=None):
        self.seen.append(tuple(image.shape[2:]))
        veil = torch.zeros_like(image) + image.mean((2, 3), keepdim=True) / 2
        return image - veil, veil, torch.zeros_like(image)


@pytest.mark.parametrize(("sides", "image", "expected"), [
    ((), (300, 400), []),
    ((0,), (300, 400), []),
    ((480,), (304, 400), [(304, 400)]),
    ((480, 240), (300, 400), [(304, 400), (144, 192)]),
    ((480, 240), (3000, 4000), [(480, 640), (240, 320)]),
    ((480, 240), (4000, 3000), [(640, 480), (320, 240)]),
    ((480, 240), (1, 9000), [(16, 8992), (16, 4496)]),
])  # fmt: skip
def test_small_images_are_shown_as_large_as_they_are_and_large_ones_smaller(sides, image, expected):
    found = views.views_of(sides, *image)
    assert [(view.height, view.width) for view in found] == expected
    assert [view.mirrored for view in found] == [False, True][: len(found)]


@pytest.mark.parametrize("size", [(200, 301), (57, 40), (64, 1000), (50, 38)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_bands_are_parts_of_the_whole(size, mirrored):
    part = np.random.default_rng(0).random((57, 40, 3), dtype=np.float32)
    view = views.View(57, 40, mirrored)
    whole = cv2.resize(part[:, ::-1] if mirrored else part, size[::-1], interpolation=cv2.INTER_LINEAR)
    bands = [view.back(part, top, min(top + 17, size[0]), size) for top in range(0, size[0], 17)]
    np.testing.assert_allclose(np.concatenate(bands), whole, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_what_is_taken_away_is_enlarged_and_the_detail_stays(dtype):
    peak = 1 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    values = np.random.default_rng(0).random((700, 500, 3)) * 0.5 + 0.25
    image = (values * peak).astype(dtype)
    model = Veiled()
    found = Separator(model, sizes=SIDES).separate(image)
    assert model.seen == [(128, 96), (96, 64)]
    mean = values.mean((0, 1))
    np.testing.assert_allclose(found.reflection, np.broadcast_to(mean / 2, image.shape), atol=0.01)
    np.testing.assert_allclose(image.astype(float) / peak - found.transmission, found.reflection, atol=1e-5)
    assert not found.residue.any()


def test_the_mean_of_what_is_taken_away_from_both_views():
    image = np.random.default_rng(0).random((300, 200, 3), dtype=np.float32)
    image = cv2.GaussianBlur(image, (0, 0), 3)
    model = Local()
    first = Separator(model, sizes=SIDES[:1]).separate(image).transmission
    second = Separator(model, sizes=SIDES[1:]).separate(image[:, ::-1]).transmission[:, ::-1]
    both = Separator(model, sizes=SIDES).separate(image).transmission
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-6)


def test_a_view_of_the_images_own_size_is_the_image(pixels):
    image = cv2.resize(pixels, (64, 48))
    model = Local()
    alone, shown = (Separator(model, sizes=sides).separate(image) for sides in ((), (64,)))
    np.testing.assert_allclose(alone.transmission, shown.transmission, atol=1e-6)
    np.testing.assert_allclose(alone.reflection, shown.reflection, atol=1e-6)


@pytest.mark.parametrize("sides", [(336, 480), (480, 0), (0, 0)])
def test_sides_that_make_no_sense_are_refused(sides):
    with pytest.raises(UserError, match=r"--sizes .*: the largest first, and 0 only by itself"):
        Separator(Local(), sizes=sides)


@pytest.mark.parametrize("stated", [None, "480", [480, "340"], [True], [-1], 480, [1.5]])
def test_checkpoints_that_state_anything_else_state_none(stated):
    assert views.stated({"options": {"sizes": stated}}) == [] == views.stated({}) == views.stated({"options": None})


def test_weights_state_the_sizes_and_the_programs_take_them(tmp_path, pixels):
    network = create_model("dsrnet_xs")
    torch.save({"weight": network.state_dict(), "inet": "dsrnet_xs"}, tmp_path / "net.pt")
    weights = tmp_path / "net.safetensors"
    assert program.run(export.main, [str(tmp_path / "net.pt"), "-o", str(weights), "--sizes", "64", "48"]) == 0
    assert load_separator(tmp_path / "net.pt", gpu_ids=[]).sizes == ()
    assert load_separator(weights, gpu_ids=[]).sizes == (64, 48)
    assert load_separator(weights, gpu_ids=[], sizes=[0]).sizes == (0,)
    assert program.run(export.main, [str(weights), "-o", str(tmp_path / "again.safetensors")]) == 0
    assert load_separator(tmp_path / "again.safetensors", gpu_ids=[]).sizes == (64, 48), "what the file states stays"
    photograph = tmp_path / "photograph.png"
    write_image(photograph, np.tile(pixels, (5, 5, 1)))
    image = read_image(photograph)
    for more, sizes in (([], (64, 48)), (["--sizes", "96"], (96,)), (["--sizes", "0"], ())):
        arguments = [str(photograph), "--checkpoint", str(weights), "--gpu_ids", "-1", "-o", str(tmp_path / "made")]
        assert program.run(infer.main, [*arguments, "--overwrite", *more]) == 0
        expected = load_separator(weights, gpu_ids=[], sizes=sizes).separate(image).transmission.clip(0, 1)
        found = read_image(tmp_path / "made/photograph_behind_glass.png")
        np.testing.assert_allclose(found, expected, atol=1.5 / 255)
