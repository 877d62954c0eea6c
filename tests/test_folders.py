"""Folders: what is found, paired, held out, and refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from dereflect.data import Loaders, build_val_loader, discover
from dereflect.data.folders import find_test_sets
from dereflect.engine import Engine
from dereflect.util.errors import UserError
from tests.helpers import PHOTOGRAPHS, options_for, write_noise, write_pairs


def test_finds_everything(base):
    sets = discover(options_for(base, "--val_split", 0))
    assert [file.name for file in sets.photographs] == [f"photo{i}.png" for i in range(8)]
    assert sets.sizes == {"synthetic": 4, "real": 5, "nature": 4}
    assert sets.mix == pytest.approx({"synthetic": 0.6, "real": 0.2, "nature": 0.2})
    assert {name: [p.name for p in pairs] for name, pairs in sets.tests.items()} == {
        "PostcardDataset": ["a", "b"],
        "real20_420": ["3", "4", "9"],
    }
    assert sets.tests["PostcardDataset"][0].reflection
    assert sets.tests["real20_420"][0].reflection is None
    assert sets.validation == []
    described = "\n".join(sets.describe())
    assert "synthetic 4 (60%), real 5 (20%), nature 4 (20%)" in described
    assert "PostcardDataset 2, real20_420 3" in described
    assert "not there to test on: SolidObjectDataset, WildSceneDataset, Nature" in described


def test_without_nature_the_published_mix_is_that_of_the_first_setting(base):
    (base / "train/nature").rename(base / "elsewhere")
    sets = discover(options_for(base))
    assert sets.mix == pytest.approx({"synthetic": 0.7, "real": 0.3})
    assert "nature (train/nature)" in "\n".join(sets.missing)
    assert "synthetic 70%, real 30%" in "\n".join(sets.missing)


def test_missing_sets_are_named_and_the_rest_renormalised(base):
    (base / "train/nature").rename(base / "elsewhere")
    sets = discover(options_for(base, "--mix", 0.4, 0.4, 0.2))
    assert sets.mix == pytest.approx({"synthetic": 0.5, "real": 0.5})
    (base / "train/real").rename(base / "elsewhere, too")
    assert discover(options_for(base)).mix == {"synthetic": 1.0}


def test_a_single_photograph_makes_no_synthetic_pair(base):
    for file in list((base / PHOTOGRAPHS).iterdir())[1:]:
        file.unlink()
    assert set(discover(options_for(base)).mix) == {"real", "nature"}


def test_a_set_that_the_mix_leaves_out_is_not_counted(base):
    sets = discover(options_for(base, "--mix", 0.7, 0.3, 0, "--val_split", 0))
    assert sets.sizes == {"synthetic": 4, "real": 5}
    assert not any("train on" in line for line in sets.missing)


def test_a_mix_of_nothing_that_is_there_is_an_error(base):
    (base / "train/nature").rename(base / "elsewhere")
    with pytest.raises(UserError, match=r"--mix 0.0 0.0 1.0: .*synthetic, real"):
        discover(options_for(base, "--mix", 0, 0, 1))


def test_nothing_there_is_an_error_that_shows_the_layout(tmp_path):
    with pytest.raises(UserError, match="anything to train on") as error:
        discover(options_for(tmp_path))
    assert f"--base_dir {tmp_path}" in str(error.value)
    assert PHOTOGRAPHS in str(error.value)
    assert "transmission_layer" in str(error.value)


def test_evaluation_alone_needs_only_test_sets(base, tmp_path):
    options = options_for(base)
    options.nEpochs = 0
    (base / "train/real/blended/r0.png").write_bytes(b"broken, but nobody asks")
    sets = discover(options)
    assert set(sets.tests) == {"PostcardDataset", "real20_420"}
    assert sets.mix == sets.pairs == {}
    (base / "test").rename(base / "elsewhere")
    with pytest.raises(UserError, match="there isn't a test set"):
        discover(options)


def test_training_alone_needs_no_test_set(base):
    (base / "test").rename(base / "elsewhere")
    sets = discover(options_for(base))
    assert sets.tests == {}
    assert "real20_420" in sets.missing[-1]


def test_an_empty_test_set_is_told(base):
    for layer in ("blended", "transmission_layer"):
        (base / "test/empty" / layer).mkdir(parents=True)
    sets = discover(options_for(base))
    assert set(sets.tests) == {"PostcardDataset", "real20_420"}
    assert f"a test set without images, left out: {base / 'test/empty'}" in sets.missing


def test_test_sets_may_lie_at_any_depth_and_share_names(base):
    write_pairs(base / "test/mine/very/deep", "a")
    write_pairs(base / "test/one/same", "a")
    write_pairs(base / "test/two/same", "a")
    (base / "test/two/circle").symlink_to(base / "test")
    (base / "test/empty/blended").mkdir(parents=True)
    (base / "test/empty/transmission_layer").mkdir()
    assert set(discover(options_for(base)).tests) == {
        "PostcardDataset", "real20_420", "deep", "one-same", "two-same",
    }  # fmt: skip


def test_what_is_no_folder_is_named(base):
    (base / PHOTOGRAPHS).rename(base / "elsewhere")
    (base / PHOTOGRAPHS).write_text("")
    with pytest.raises(UserError, match="PNGImages: cannot be read"):
        discover(options_for(base))


def test_partners_match_by_stem(base):
    source = base / "train/real/blended/r0.png"
    Image.open(source).save(source.with_suffix(".BMP"))
    source.unlink()
    (base / "train/real/blended/notes.txt").write_text("not an image")
    (base / "train/real/blended/.hidden.png").write_text("not an image either")
    pair = discover(options_for(base, "--val_split", 0)).pairs["real"][0]
    assert (pair.mixture.name, pair.transmission.name) == ("r0.BMP", "r0.png")


def test_all_trouble_is_reported_at_once(base):
    (base / "train/real/blended/r0.png").unlink()
    (base / "test/real20_420/transmission_layer/3.png").unlink()
    (base / "test/SIR2/PostcardDataset/reflection_layer/a.png").unlink()
    write_noise(base / "train/nature/transmission_layer/n1.png", 1, width=27)
    (base / PHOTOGRAPHS / "photo3.png").write_bytes(b"junk")
    truncated = base / "test/real20_420/blended/9.png"
    truncated.write_bytes(truncated.read_bytes()[:-40])
    write_noise(base / "train/real/blended/r3.bmp", 0)
    with pytest.raises(UserError) as error:
        discover(options_for(base))
    lines = str(error.value).splitlines()
    assert "7 files" in lines[0]
    for start, rest in (
        ("train/real/transmission_layer/r0.png: no image of that name", "train/real/blended"),
        ("test/real20_420/blended/3.png: no image of that name", "transmission_layer"),
        ("test/SIR2/PostcardDataset/blended/a.png: no image of that name", "reflection_layer"),
        ("train/nature/transmission_layer/n1.png: 27x20 pixels", "28x20"),
        (f"{PHOTOGRAPHS}/photo3.png: not an image", ""),
        ("test/real20_420/blended/9.png: ", "truncated"),
        ("train/real/blended/r3: 2 files of that name", ""),
    ):
        found = [line for line in lines if line.strip().startswith(f"{base}/{start}")]
        assert len(found) == 1, start
        assert rest in found[0]


def test_a_long_list_of_trouble_is_cut(base):
    for i in range(70):
        write_noise(base / f"train/real/blended/alone{i}.png", i)
    with pytest.raises(UserError) as error:
        discover(options_for(base))
    lines = str(error.value).splitlines()
    assert len(lines) == 52
    assert "70 files" in lines[0]
    assert "20 more" in lines[-1]


def test_max_dataset_size_takes_the_first_by_name(base):
    (base / PHOTOGRAPHS / "photo7.png").write_bytes(b"junk that is never looked at")
    sets = discover(options_for(base, "--max_dataset_size", 2, "--val_split", 0))
    assert [file.stem for file in sets.photographs] == ["photo0", "photo1"]
    assert [pair.name for pair in sets.pairs["real"]] == ["r0", "r1"]
    assert [pair.name for pair in sets.tests["real20_420"]] == ["3", "4"]


def test_held_out_pairs_depend_on_their_own_name_alone(tmp_path):
    names = [f"{i}" for i in range(60)]
    write_pairs(tmp_path / "train/real", names, width=8, height=8)
    few = discover(options_for(tmp_path, "--val_split", 0.2))
    held_out = {pair.name for pair in few.validation}
    assert 4 <= len(held_out) <= 22  # 12 expected, four standard deviations either way
    assert held_out | {pair.name for pair in few.pairs["real"]} == set(names)
    assert not held_out & {pair.name for pair in few.pairs["real"]}
    write_pairs(tmp_path / "train/real", [f"more{i}" for i in range(60)], width=8, height=8)
    many = discover(options_for(tmp_path, "--val_split", 0.2))
    assert {pair.name for pair in many.validation if not pair.name.startswith("more")} == held_out
    more = discover(options_for(tmp_path, "--val_split", 0.5))
    assert {pair.name for pair in more.validation} > held_out


@pytest.mark.parametrize(("share", "held_out"), [(0, 0), (1e-9, 2), (1 - 1e-9, 7)])
def test_one_pair_at_least_is_held_out_and_one_kept(base, share, held_out):
    sets = discover(options_for(base, "--val_split", share))
    assert len(sets.validation) == held_out
    assert all(sets.pairs.values())


def test_a_set_of_one_pair_is_all_trained_on(tmp_path):
    write_pairs(tmp_path / "train/real", "a")
    sets = discover(options_for(tmp_path, "--val_split", 0.9))
    assert len(sets.pairs["real"]) == 1
    assert sets.validation == []
    assert build_val_loader(options_for(tmp_path), sets) is None


def test_test_sets_of_one_name_and_names_that_a_record_needs(tmp_path):
    for place in ("camera/day", "phone/day"):
        write_pairs(tmp_path / "test" / place, "a")
    assert sorted(find_test_sets(tmp_path / "test")) == ["camera-day", "phone-day"]
    for name in ("val", "average", "average_published", "averages"):
        write_pairs(tmp_path / name / "test" / name, "a")
        with pytest.raises(UserError, match=f"{name}: a test set can't be named '{name}'.*rename the folder"):
            find_test_sets(tmp_path / name / "test")


def test_a_process_without_held_out_pairs_still_takes_part_in_their_evaluation(base):
    """Fewer held-out pairs than processes: all of them must agree on which sets they evaluate."""
    options = options_for(base)
    sets = discover(options)
    sets = replace(sets, validation=sets.tests[next(iter(sets.tests))][:1])
    loaders = [build_val_loader(options, sets, rank, 2) for rank in range(2)]
    assert [len(loader) for loader in loaders] == [1, 0]
    evaluated = []
    for loader in loaders:
        names = []
        world = SimpleNamespace(gather=lambda rows: rows, share=lambda value: value, is_main=False)
        record = SimpleNamespace(
            start_evaluation=lambda epoch, step, sets, names=names: names.extend(sets),
            **dict.fromkeys(("evaluation", "panel", "averages"), lambda *_: None),
        )
        engine = SimpleNamespace(loaders=Loaders(None, loader, {"x": loader}, {}), record=record, world=world)
        engine.global_step, engine.evaluate = 0, lambda loader, name: ([], [])
        Engine._evaluate_all(engine, 1)
        evaluated.append(names)
    assert evaluated == [["val", "x"], ["val", "x"]]
