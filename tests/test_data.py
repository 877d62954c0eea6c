"""Datasets, samplers, loaders and the cache."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dereflect.data import build_loaders, build_test_loaders, build_train_loader, build_val_loader, discover
from dereflect.data.sampling import EpochSampler, generator
from dereflect.data.sirs_dataset import TestSet, TrainSet
from dereflect.util.distributed import World
from dereflect.util.errors import UserError
from tests.helpers import PHOTOGRAPHS, ROOT, assert_same, batches, loader_of, options_for, write_noise, write_pairs


class TestTrainSet:
    def test_a_sample_depends_on_seed_epoch_and_index_alone(self, base):
        sets = discover(options_for(base))
        one, two = (TrainSet(options_for(base), sets) for _ in range(2))
        expected = [one[0, i] for i in range(len(one))]
        for key in reversed(range(len(one))):
            two[5, key]  # whatever was asked before makes no difference
            assert_same([two[0, key]], [expected[key]])
        other = TrainSet(options_for(base, "--seed", 1), sets)
        assert any(not torch.equal(other[0, i]["mixture"], expected[i]["mixture"]) for i in range(3))
        assert not torch.equal(one[1, 0]["mixture"], expected[0]["mixture"])
        assert one[0, 0]["name"] == expected[0]["name"]

    def test_samples_are_what_training_expects(self, base):
        dataset = TrainSet(options_for(base), discover(options_for(base)))
        seen = Counter()
        for i in range(60):
            sample = dataset[0, i]
            source, name = sample["name"].split("/")
            seen[source] += 1
            for key in ("mixture", "target_t", "target_r"):
                assert sample[key].dtype == torch.float32
                assert sample[key].shape == (3, 16, 16)
                assert sample[key].is_contiguous()
            for key in ("mixture", "target_t"):
                assert sample[key].min() >= 0
                assert sample[key].max() <= 1 + 1e-6
            if source == "synthetic":
                assert len(set(name.split("+"))) == 2
                assert sample["target_r"].min() >= 0
            else:
                assert torch.equal(sample["target_r"], sample["mixture"] - sample["target_t"])
        assert set(seen) == {"synthetic", "real", "nature"}

    def test_both_images_of_a_pair_are_treated_alike(self, tmp_path):
        for layer in ("blended", "transmission_layer"):
            write_noise(tmp_path / "train/real" / layer / "a.png", 3, width=40, height=33)
        dataset = TrainSet(options_for(tmp_path), discover(options_for(tmp_path)))
        for i in range(20):
            sample = dataset[0, i]
            assert torch.equal(sample["mixture"], sample["target_t"])
            assert not sample["target_r"].any()

    def test_sources_come_in_the_proportions_of_the_mix(self, base):
        options = options_for(base, "--mix", 5, 3, 2)
        dataset = TrainSet(options, discover(options))
        seen = Counter(dataset[0, i]["name"].split("/")[0] for i in range(1000))
        for source, share in (("synthetic", 0.5), ("real", 0.3), ("nature", 0.2)):
            assert seen[source] / 1000 == pytest.approx(share, abs=0.06)  # four standard deviations

    def test_pairs_come_by_index(self, base):
        options = options_for(base, "--mix", 0, 1, 0, "--val_split", 0)
        dataset = TrainSet(options, discover(options))
        assert [dataset[0, i]["name"] for i in range(7)] == [f"real/r{i % 5}" for i in range(7)]

    def test_photographs_are_halved_anew_every_epoch(self, base):
        write_noise(base / PHOTOGRAPHS / "photo8.png", 8)  # of an odd number one rests
        options = options_for(base, "--mix", 1, 0, 0)
        dataset = TrainSet(options, discover(options))
        assert len(dataset) == 4
        halves = []
        for epoch in range(6):
            names = [dataset[epoch, i]["name"].removeprefix("synthetic/").split("+") for i in range(len(dataset))]
            first, second = (set(half) for half in zip(*names, strict=True))
            assert len(first) == len(second) == 4
            assert not first & second
            halves.append(frozenset(first))
        assert len(set(halves)) > 3

    def test_a_long_epoch_halves_the_photographs_again_and_again(self, base):
        """With the list shuffled once only, it would have as many pairs as half the photographs."""
        options = options_for(base, "--mix", 1, 0, 0, "--epoch_size", 40)
        dataset = TrainSet(options, discover(options))
        names = [dataset[0, i]["name"].removeprefix("synthetic/").split("+") for i in range(40)]
        for around in range(10):
            assert len({stem for pair in names[4 * around : 4 * around + 4] for stem in pair}) == 8
        assert len(set(map(tuple, names))) > 20

    def test_epoch_size(self, base):
        sets = discover(options_for(base, "--val_split", 0))
        assert len(TrainSet(options_for(base), sets)) == 4 + 5 + 4
        assert len(TrainSet(options_for(base, "--epoch_size", 50), sets)) == 50

    def test_can_be_sent_to_a_worker(self, base):
        dataset = TrainSet(options_for(base), discover(options_for(base)))
        assert_same([pickle.loads(pickle.dumps(dataset))[1, 2]], [dataset[1, 2]])


class TestTestSet:
    def test_native_size(self, base):
        sets = discover(options_for(base))
        sample = TestSet(options_for(base), sets.tests["real20_420"])[1]
        assert sample["name"] == "4"
        stored = np.asarray(Image.open(base / "test/real20_420/blended/4.png")).transpose(2, 0, 1)
        np.testing.assert_allclose(sample["mixture"].numpy(), stored / 255, atol=1e-6)
        assert sample["mixture"].shape == (3, 50, 70)
        assert torch.equal(sample["target_r"], sample["mixture"] - sample["target_t"])
        assert sample["target_r"].min() < 0

    def test_reflection_layer_is_used_where_there_is_one(self, base):
        sample = TestSet(options_for(base), discover(options_for(base)).tests["PostcardDataset"])[0]
        layer = base / "test/SIR2/PostcardDataset/reflection_layer/a.png"
        stored = np.asarray(Image.open(layer)).transpose(2, 0, 1)
        np.testing.assert_allclose(sample["target_r"].numpy(), stored / 255, atol=1e-6)

    @pytest.mark.parametrize(("name", "shape"), [("real20_420", (3, 32, 64)), ("PostcardDataset", (3, 32, 32))])
    def test_aligned_to_multiples_of_32(self, base, name, shape):
        options = options_for(base, "--if_align")
        sample = TestSet(options, discover(options).tests[name])[0]
        assert {sample[key].shape for key in ("mixture", "target_t", "target_r")} == {shape}
        pair = discover(options).tests[name][0]
        resized = Image.open(pair.mixture).resize(shape[:0:-1], Image.Resampling.BICUBIC)
        np.testing.assert_allclose(sample["mixture"].numpy(), np.asarray(resized).transpose(2, 0, 1) / 255, atol=1e-6)


class TestSampler:
    @settings(max_examples=60, deadline=None)
    @given(
        length=st.integers(1, 60), batch=st.integers(1, 5), world=st.integers(1, 4),
        seed=st.integers(0, 2**40), epoch=st.integers(0, 99),
    )  # fmt: skip
    def test_ranks_share_out_one_order(self, length, batch, world, seed, epoch):
        samplers = [EpochSampler(length, batch, seed, rank, world) for rank in range(world)]
        alone = EpochSampler(length, 1, seed)
        for sampler in (*samplers, alone):
            sampler.seek(epoch)
        order = [entry for batch_ in alone for entry in batch_]
        assert sorted(order) == [(epoch, i) for i in range(length)]
        steps = list(zip(*samplers, strict=True))
        assert {len(steps)} == {len(sampler) for sampler in samplers} == {length // (batch * world)}
        assert [entry for step in steps for part in step for entry in part] == order[: len(steps) * batch * world]

    @settings(max_examples=40, deadline=None)
    @given(length=st.integers(1, 40), batch=st.integers(1, 4), step=st.integers(0, 50))
    def test_seeking_gives_the_rest_of_the_epoch(self, length, batch, step):
        sampler = EpochSampler(length, batch, seed=5)
        sampler.seek(3)
        whole = list(sampler)
        sampler.seek(3, step)
        assert list(sampler) == list(sampler) == whole[step:]
        assert len(sampler) == len(whole)

    def test_every_epoch_has_its_own_order(self):
        sampler = EpochSampler(50, 1, seed=5)
        orders = set()
        for epoch in range(5):
            sampler.seek(epoch)
            orders.add(tuple(index for [(_, index)] in sampler))
        assert len(orders) == 5

    def test_random_numbers_of_different_keys_differ(self):
        keys = [
            (1, 0, 0, 1),
            (1, 0, 0, 2),
            (1, 0, 1, 0),
            (1, 1, 0, 0),
            (0, 0, 0, 1),
            (0, 1, 0, 0),
            (1, 0, 0, 0),
        ]
        assert len({generator(*key).random() for key in keys}) == len(keys)


class TestLoaders:
    def test_workers_change_nothing_and_an_epoch_can_be_resumed(self, base):
        options = options_for(base, "--batchSize", 2, "--epoch_size", 13)
        sets = discover(options)
        alone = build_train_loader(options, sets)
        options.nThreads = 2
        shared = build_train_loader(options, sets)
        assert len(alone) == len(shared) == 6
        whole = batches(alone)
        assert len(whole) == 6
        assert whole[0]["mixture"].shape == (2, 3, 16, 16)
        assert_same(batches(shared), whole)
        assert_same(batches(shared, epoch=0, step=4), whole[4:])  # same workers, another place
        next(iter(shared))  # an epoch that is given up leaves nothing behind for the next
        assert_same(batches(shared, epoch=1), batches(alone, epoch=1))

    def test_ranks_change_nothing(self, base):
        options = options_for(base, "--batchSize", 4, "--epoch_size", 13)
        sets = discover(options)
        together = batches(build_train_loader(options, sets), epoch=2)
        options.batchSize = 2
        ranks = [batches(build_train_loader(options, sets, rank, 2), epoch=2) for rank in (0, 1)]
        joined = [
            {key: a[key] + b[key] if key == "name" else torch.cat([a[key], b[key]]) for key in a}
            for a, b in zip(*ranks, strict=True)
        ]
        assert_same(joined, together)

    def test_an_epoch_smaller_than_a_step_is_an_error(self, base):
        options = options_for(base, "--batchSize", 5, "--epoch_size", 9)
        sets = discover(options)
        assert len(build_train_loader(options, sets)) == 1
        with pytest.raises(UserError, match="--batchSize"):
            build_train_loader(options, sets, rank=1, world_size=2)
        options.accumulate = 2
        with pytest.raises(UserError, match="--accumulate 2"):
            build_train_loader(options, sets)

    def test_test_sets_come_in_order_and_can_be_shared_out(self, base):
        options = options_for(base)
        sets = discover(options)
        loaders = build_test_loaders(options, sets)
        assert {name: [batch["name"] for batch in loader] for name, loader in loaders.items()} == {
            "PostcardDataset": [["a"], ["b"]],
            "real20_420": [["3"], ["4"], ["9"]],
        }
        shares = [build_test_loaders(options, sets, rank, 4)["real20_420"] for rank in range(4)]
        assert [[batch["name"][0] for batch in loader] for loader in shares] == [["3"], ["4"], ["9"], []]

    def test_validation_shows_the_held_out_pairs(self, base):
        options = options_for(base)
        sets = discover(options)
        names = [batch["name"][0] for batch in build_val_loader(options, sets)]
        assert names == [pair.name for pair in sets.validation]
        assert len(names) == 2

    def test_a_dataset_file_of_ones_own(self, base, monkeypatch):
        mine = type(sys)("dereflect.data.mine")
        mine.TrainSet = type("TrainSet", (TrainSet,), {"__getitem__": lambda self, key: key})
        mine.TestSet = TestSet
        monkeypatch.setitem(sys.modules, "dereflect.data.mine", mine)
        options = options_for(base)
        options.dataset = "mine"
        loader = build_train_loader(options, discover(options))
        loader.batch_sampler.seek(7)
        assert all(int(epoch) == 7 for epoch, _ in loader)

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes through /proc")
    def test_workers_end_with_the_main_process_and_leave_ctrl_c_to_it(self, base, tmp_path):
        program = tmp_path / "program.py"
        program.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == "__main__":
    from dereflect.data import build_train_loader, discover
    from dereflect.options import parse_train
    options = parse_train(["--base_dir", {str(base)!r}, "--crop_size", "16", "--nThreads", "2"])
    loader = build_train_loader(options, discover(options))
    batches = iter(loader)
    next(batches)
    print(*(worker.pid for worker in loader.workers), flush=True)
    sys.stdin.read()
""")
        main = subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            workers = [int(pid) for pid in main.stdout.readline().split()]
            assert len(workers) == 2
            for pid in workers:
                os.kill(pid, signal.SIGINT)
            time.sleep(0.2)
            assert all(alive(pid) for pid in workers)
        finally:
            main.kill()
            main.communicate()
        end = time.monotonic() + 20
        while any(alive(pid) for pid in workers) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestCache:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_samples_are_the_same_with_and_without(self, base, workers):
        plain = batches(loader_of(base))
        cached = loader_of(base, "--cache_images", "0.001", "--nThreads", workers)
        assert_same(batches(cached), plain)
        assert_same(batches(cached), plain)  # now out of the cache

    def test_every_file_is_decoded_once(self, base, monkeypatch):
        from dereflect.data import cache

        read = Counter()
        decode = cache.read_rgb
        monkeypatch.setattr(cache, "read_rgb", lambda file, least: (read.update([file]), decode(file, least))[1])
        loader = loader_of(base, "--cache_images", "0.001", "--val_split", "0")
        for epoch in range(20):
            batches(loader, epoch)
        assert set(read.values()) == {1} and len(read) == 8 + 2 * 9

    def test_what_finds_no_room_is_decoded_again(self, base, monkeypatch):
        plain = batches(loader_of(base))
        loader = loader_of(base, "--cache_images", "0.000003")  # 3 KB: one image
        assert_same(batches(loader), plain)
        kept = loader.dataset.images.entries
        assert int(kept[:, -1].sum()) == 1 and int(loader.dataset.images.used) <= 0.000003 * 2**30

    def test_more_than_there_is(self, base):
        with pytest.raises(UserError, match="--cache_images 1e"):
            loader_of(base, "--cache_images", "1e6")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_test_images_of_equal_size_come_together(tmp_path, size):
    for i, width in enumerate((40, 48, 40, 40, 48, 56, 40)):
        write_pairs(tmp_path / "test/a", [f"{i}"], width=width)
        write_pairs(tmp_path / "train/real", [f"{i}"])
    options = options_for(tmp_path, "--eval_batch", size)
    loader = build_test_loaders(options, discover(options))["a"]
    found = [(batch["name"], batch["mixture"].shape[-1]) for batch in loader]
    assert sorted(name for names, _ in found for name in names) == list("0123456")
    expected = {
        1: [["0"], ["1"], ["2"], ["3"], ["4"], ["5"], ["6"]],
        2: [["0", "2"], ["1", "4"], ["3", "6"], ["5"]],
        5: [["0", "2", "3", "6"], ["1", "4"], ["5"]],
    }
    assert [names for names, _ in found] == expected[size]


def test_every_process_learns_that_the_demo_set_cannot_be_made(tmp_path):
    """The process of rank 1 neither waits for rank 0 nor goes on without a set."""

    class Second(World):
        def share(self, value: object) -> object:
            return UserError("the demo set cannot be written")

        def barrier(self) -> None:
            raise AssertionError("waits for a process that has stopped")

    options = options_for(tmp_path)
    options.demo = True
    with pytest.raises(UserError, match="demo set cannot be written"):
        build_loaders(options, Second(torch.device("cpu"), rank=1, size=2), lambda line: None)
