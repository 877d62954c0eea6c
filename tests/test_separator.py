"""Separating images of any size: tiles, networks and their weights."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dereflect.models import separator as separators
from dereflect.models import tiles, weights
from dereflect.models.arch import create_model, list_models
from dereflect.models.dsrnet_model_sirs import DSRNetModel
from dereflect.models.features import build_features
from dereflect.models.memory import bytes_per_pixel
from dereflect.models.scan import why_refused
from dereflect.models.separator import Separator, load_separator
from dereflect.models.weights import architecture_of
from dereflect.options import PRETRAINED
from dereflect.options.arguments import TILE_STRIDE
from dereflect.tools.inspection import field, seams
from dereflect.util.errors import UserError
from tests.helpers import GOLDEN, Local, published_state

BOUND = 18  # levels of 255, between tiles of 256 pixels and the whole image


class Drifting(Local):
    """Every call's result is brighter than the last one's, as a network's is that looks at the whole tile."""

    @torch.no_grad()
    def predict(self, image: Tensor, part: tuple[slice, slice] | None = None) -> tuple[Tensor, ...]:
        image = image[(..., *part)] if part else image
        self.seen.append(tuple(image.shape[2:]))
        return (torch.full_like(image, float(len(self.seen) % 2)),) * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of dsrnet_s as a training leaves it, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    torch.manual_seed(0)
    state = create_model("dsrnet_s").state_dict()
    average = {name: value * 1.01 for name, value in state.items()}
    recorded = {"inet": "dsrnet_s", "vgg_weights": "random"}
    content = {"format": 1, "inet": "dsrnet_s", "options": recorded, "epoch": 3, "network": state, "ema": average}
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def real(trained) -> Separator:
    return load_separator(trained, gpu_ids=[], precision="fp32", tile=64)


# ---- tiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile", "overlap"), [(64, 32), (96, 32), (128, 64), (1024, 256)])
def test_tiles_cover_everything_and_their_weights_sum_to_one(tile, overlap):
    for length in [*range(1, 400), 1025, 9000, 12000]:
        spans = tiles.spans(length, tile, overlap)
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(end - start <= tile and start % TILE_STRIDE == 0 for start, end in spans)
        assert all(end - following >= min(overlap, tile) for (_, end), (following, _) in pairwise(spans))
        total = np.zeros(length)
        for (start, end), weight in zip(spans, tiles.weights(spans), strict=True):
            assert weight.shape == (end - start,) and weight.min() >= 0
            total[start:end] += weight
        np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (131, 1), (64, 64), (65, 64), (201, 137)])
def test_tiled_is_whole_for_a_local_network(size):
    """But for the rounding of float32: what a tile lacks of its surroundings has no weight."""
    image = np.random.default_rng(0).random((*size, 3), dtype=np.float32)
    model = Local()
    tiled = Separator(model, tile=64, overlap=32).separate(image)
    assert max(max(shape) for shape in model.seen) <= 64
    whole = Separator(model, tile=1024).separate(image)
    for part in separators.PARTS:
        assert getattr(tiled, part).dtype == np.float32
        np.testing.assert_allclose(getattr(tiled, part), getattr(whole, part), atol=1e-6)


def test_tiles_that_differ_fade_into_each_other():
    """The worst case: neighbours are 0 and 1. No step is larger than the steepest of a half cosine."""
    image = np.zeros((60, 500, 3), np.uint8)
    model = Drifting()
    t = Separator(model, tile=128, overlap=64).separate(image).transmission[30, :, 0]
    assert len(model.seen) > 3 and t.min() < 1e-6 and t.max() > 1 - 1e-6
    assert np.abs(np.diff(t)).max() < np.pi / 2 / (0.75 * 64) * 1.01
    assert np.abs(np.diff(t, 2)).max() < 0.003, "no kinks"


def test_memory_is_a_band_of_tiles_whatever_the_height():
    image = np.broadcast_to(np.uint8(100), (3000, 80, 3))
    model = Local()
    shapes = []
    for _, (band,) in Separator(model, tile=64, overlap=32).bands(image, ["reflection"]):
        shapes.append(band.base.shape)
    assert len(shapes) > 50 and set(shapes) == {(64, 80, 3)}, "one band is held, of the wanted part only"
    assert max(max(size) for size in model.seen) <= 64


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays_of_any_type(pixels, dtype):
    peak = 1 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    image = (pixels / 255 * peak).astype(dtype)
    result = Separator(Local(), tile=64).separate(image)
    np.testing.assert_allclose(result.reflection, image.astype(np.float64) / peak, atol=1e-7)


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((4, 4, 4)), np.zeros((4, 4, 3), int), np.zeros((0, 4, 3))])
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(ValueError, match="an image must be"):
        Separator(Local(), tile=64).separate(bad)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("change", [lambda x: x * 255, lambda x: x - 1, lambda x: x * np.nan])
def test_floats_that_are_not_in_0_to_1_are_refused(pixels, dtype, change):
    image = (pixels / 255).astype(dtype)
    Separator(Local(), tile=64).separate(image * dtype(1.2) - dtype(0.1))  # as an image that was sharpened
    with pytest.raises(ValueError, match=r"must be in 0\.\.1, not"):
        Separator(Local(), tile=64).separate(change(image))


def test_an_image_is_taken_whole_where_the_machine_has_the_memory_else_in_tiles_as_large_as_it_allows(monkeypatch):
    separator = Separator(Local())
    monkeypatch.setattr(separators, "bytes_per_pixel", lambda model: 1000)

    def tile(memory: float) -> int:
        monkeypatch.setattr(separators, "total_memory", lambda device: memory)
        return separator.tile_for(900, 1000)

    sides = [tile(gigabytes * 1e9) for gigabytes in (0, 0.5, 1.5, 1.9, 400)]
    assert sides == [256, 480, 864, 1024, 1024], "half of the memory"
    assert separator.tile_for(100, 200) == 224, "whole, whatever the memory"


def test_memory_is_measured_for_each_network():
    small, large = (
        DSRNetModel(create_model(name), build_features(create_model(name).features, "random"), None)
        for name in ("madsrnet_xs", "dsrnet_s")
    )
    assert 300 < bytes_per_pixel(small) < 3000 < bytes_per_pixel(large) < 40_000


@pytest.mark.parametrize("size", [(416, 512), (389, 530)])
def test_tiles_of_a_network_know_the_whole_image(size):
    """Convolutions reach farther than the overlap, so some difference stays; tiles by themselves differ by more."""
    alone, together = compared(load_separator(PRETRAINED, gpu_ids=[], precision="fp32"), size, 256, 128)
    for apart, near in zip(alone, together, strict=True):
        assert near.largest < BOUND and near.mean < BOUND / 12, (apart, near)
        assert near.mean < apart.mean / 3, (apart, near)


@pytest.mark.parametrize("name", ["dsrnet_xs", "mdsrnet_xs"])
@pytest.mark.parametrize("ensemble", [False, True])
def test_tiles_of_any_network_are_nearer_to_the_whole_than_by_themselves(name, ensemble):
    network = field.prepared(name, None, 0.5)
    model = DSRNetModel(network, build_features(network.features, "random"), None)
    alone, together = compared(Separator(model, self_ensemble=ensemble), (192, 160), 128, 64)
    for apart, near in zip(alone, together, strict=True):
        assert near.mean < apart.mean, (apart, near)


def compared(separator: Separator, size: tuple[int, int], tile: int, overlap: int) -> list[list[seams.Difference]]:
    image = seams.example()[200 : 200 + size[0], 300 : 300 + size[1]]
    found = seams.differences(Separator(separator.model, tile, overlap, separator.self_ensemble), image)
    return [found[way] for way in seams.WAYS]


def test_memory_that_runs_out_is_told(monkeypatch):
    def fail(image, part=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = Local()
    monkeypatch.setattr(model, "predict", fail)
    with pytest.raises(UserError, match="--tile 64 or less"):
        Separator(model, tile=128).separate(np.zeros((128, 128, 3)))


# ---- networks ---------------------------------------------------------------------------------------------------


def test_whole_image_is_the_models_prediction(real, pixels):
    image = torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None]
    for part, expected in zip(separators.PARTS, real.model.predict(image), strict=True):
        np.testing.assert_array_equal(getattr(real.separate(pixels), part), expected[0].permute(1, 2, 0))


@pytest.mark.parametrize("size", [(1, 1), (17, 3), (70, 20)])
def test_real_network_at_any_size(real, size):
    result = real.separate(np.full((*size, 3), 100, np.uint8))
    for part in separators.PARTS:
        assert getattr(result, part).shape == (*size, 3) and np.isfinite(getattr(result, part)).all()


def test_self_ensemble_is_the_mean_of_eight(real, pixels):
    pixels = pixels[:10, :20]
    ensemble = Separator(real.model, tile=64, self_ensemble=True).separate(pixels)
    for part in separators.PARTS:
        parts = []
        for turns in range(4):
            turned = np.rot90(pixels, turns)
            parts.append(np.rot90(getattr(real.separate(turned), part), -turns))
            parts.append(np.rot90(getattr(real.separate(turned[:, ::-1]), part)[:, ::-1], -turns))
        np.testing.assert_allclose(getattr(ensemble, part), np.mean(parts, 0), atol=1e-6)


def test_checkpoint_says_what_it_is(real, trained):
    assert (real.inet, real.epoch) == ("dsrnet_s", 3)
    network = real.model.network.state_dict()
    average = torch.load(trained, weights_only=True)["ema"]
    assert all(torch.equal(network[name], value) for name, value in average.items()), "the moving average is taken"


def test_vgg_of_the_training_must_be_there(trained, tmp_path):
    content = torch.load(trained, weights_only=True)
    content["options"] = {"vgg_weights": "/nowhere/vgg19.pth"}
    torch.save(content, tmp_path / "moved.pt")
    with pytest.raises(UserError, match=r"moved\.pt.*/nowhere/vgg19\.pth.*--vgg_weights"):
        load_separator(tmp_path / "moved.pt", gpu_ids=[])
    assert load_separator(tmp_path / "moved.pt", vgg_weights="random", gpu_ids=[], tile=64).inet == "dsrnet_s"


def test_architecture_is_found_by_the_published_parameters():
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
    for name in ("dsrnet_s", "mdsrnet_l"):
        state = {key: torch.zeros(()).expand(shape) for key, shape in shapes[name].items() if "seq_r" not in key}
        assert architecture_of({"icnn": state}, "x.pt") == name
    gone = ("lrm.blocks_merge.2.", "lrm.blocks_merge.3.")
    nature = {key: shape for key, shape in shapes["dsrnet_l"].items() if not key.startswith(gone)}
    state = {key: torch.zeros(()).expand(shape) for key, shape in nature.items()}
    assert architecture_of({"icnn": state}, "x.pt") == "dsrnet_l_nature"


def test_every_architecture_is_found_and_unique():
    for name in set(list_models()) - {"dsrnet_frozen_stem_xs"}:  # has dsrnet_xs's parameters
        state = {key: torch.zeros(()).expand(shape) for key, shape in weights._shapes(name).items()}
        assert architecture_of({"network": state}, "x.pt") == name


def test_foreign_weights_are_named(tmp_path):
    torch.save({"weight": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: its 1 parameters .* --inet"):
        load_separator(tmp_path / "other.pt", gpu_ids=[])
    with pytest.raises(UserError, match=r"other\.pt: .*left over: conv\.weight"):
        load_separator(tmp_path / "other.pt", inet="dsrnet_s", gpu_ids=[])
    with pytest.raises(UserError, match="--inet dsrnet_xxl"):
        load_separator(tmp_path / "other.pt", inet="dsrnet_xxl", gpu_ids=[])


def test_published_checkpoint(tmp_path):
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())["dsrnet_s"]
    torch.save({"icnn": published_state(shapes), "epoch": 18}, tmp_path / "published.pt")
    separator = load_separator(tmp_path / "published.pt", vgg_weights="random", gpu_ids=[], tile=64)
    assert (separator.inet, separator.epoch) == ("dsrnet_s", 18)


def test_networks_with_their_own_stem_need_no_vgg(tmp_path, pixels):
    network = create_model("dsrnet_xs")
    torch.save({"inet": "dsrnet_xs", "network": network.state_dict()}, tmp_path / "xs.pt")
    separator = load_separator(tmp_path / "xs.pt", gpu_ids=[])
    assert separator.model.features is None
    assert separator.separate(pixels).transmission.shape == pixels.shape


def test_precision_is_that_of_the_training(trained, tmp_path):
    content = torch.load(trained)
    content["options"]["precision"] = "bf16"
    torch.save(content, tmp_path / "bf16.pt")
    assert not load_separator(trained, gpu_ids=[]).model.bf16, "nothing is said"
    assert load_separator(tmp_path / "bf16.pt", gpu_ids=[]).model.bf16
    assert not load_separator(tmp_path / "bf16.pt", gpu_ids=[], precision="fp32").model.bf16


@pytest.mark.parametrize("name", ["triton", "mistyped"])
def test_a_backend_of_the_environment_that_cannot_run_is_one_line(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SCAN_BACKEND", name)
    assert f"SCAN_BACKEND {name}: " in why_refused(None, "cpu") and why_refused("cpu", "cpu") is None
    with pytest.raises(UserError, match=f"SCAN_BACKEND {name}: "):
        load_separator(PRETRAINED, gpu_ids=[])
