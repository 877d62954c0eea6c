"""Engine: the training loop, the evaluation after every epoch, and the state that both leave."""

import argparse
import contextlib
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data import Loaders
from data.loader import Loader
from models.arch.blocks import Block
from options import as_text
from util import disk
from util.device import enough_memory, less_memory_for_a_step, less_memory_for_images
from util.distributed import World
from util.errors import UserError
from util.evaluation import measure, separate
from util.images import write_image
from util.program import Interrupt, Interrupted
from util.progress import Progress, track
from util.run import checkpoint, resume
from util.run.record import Record
from util.stability import BlockNorms, Guard, Verdict

_KINDS = {"inet": str, "options": dict, "epoch": int, "step": int, "global_step": int, "best": float | None}
_KINDS |= {"network": dict, "ema": dict | None, "ema_updates": int, "optimizer": dict, "random": Tensor}
"""What a checkpoint must hold to be resumed from."""


class Diverged(Exception):
    """A loss or a gradient wasn't finite, or the guard could not hold the training; the message says what to do."""


def learning_rate(step: int, options: argparse.Namespace, total: int) -> float:
    """The rate of a step (from 0) of `total`.

    "cosine_iter" falls from lr to lr_min in `period` steps and rises again in as many (the -W models' schedule:
    cosine annealing stepped every iteration); "cosine" falls once over the whole run.
    """
    if options.scheduler == "none":
        return options.lr
    period = options.period if options.scheduler == "cosine_iter" else max(1, total)
    return options.lr_min + (options.lr - options.lr_min) * (1 + math.cos(math.pi * step / period)) / 2


def parameter_groups(network: nn.Module, decay: float) -> list[dict]:
    """Weight decay for the weights of convolutions and linear layers, and for nothing else."""
    decayed = {
        id(module.weight) for module in network.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)
    }
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


class Engine:
    """Trains a model and keeps everything about the run.

    Args:
        options: of `options.parse_train`.
        model: of `models.build_model`; moved to the world's device.
        loaders: the data.
        world: this process among all.
        folder: of the run.
    """

    def __init__(self, options: argparse.Namespace, model: nn.Module, loaders: Loaders, world: World, folder: Path):
        self.options, self.loaders, self.world, self.folder = options, loaders, world, folder
        self.device = world.device
        self.model = model.to(self.device)
        self.network: nn.Module = model.network
        self.ema = None
        if options.ema:
            self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
        optimizer = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
        decay = options.wd if options.optimizer == "adamw" else 0.0
        groups = parameter_groups(self.network, decay)
        self.optimizer = optimizer(groups, lr=options.lr, betas=(0.9, 0.999), fused=True)
        self.samples_per_step = options.batchSize * options.accumulate * world.size
        self.identity = {
            "inet": options.inet,
            "options": as_text(options),
            "samples_per_step": self.samples_per_step,
            "data": loaders.files,
            "code": resume.code(),
        }
        self.steps_per_epoch = len(loaders.train) // options.accumulate if loaders.train else 0
        if loaders.train and not self.steps_per_epoch:
            raise UserError(
                f"--accumulate {options.accumulate}: an epoch has only {len(loaders.train)} batches; "
                "lower it or --batchSize, or raise --epoch_size"
            )
        self.epoch = 0  # epochs done, evaluation included
        self.step = 0  # steps of the optimiser done in the epoch that is running
        self.global_step = 0
        self.best: float | None = None
        self.saved: int | None = None  # step of the newest checkpoint
        self.guard = Guard() if options.guard else None
        self.norms = None
        if options.log_norms:
            blocks = {name: part for name, part in self.network.named_modules() if isinstance(part, Block)}
            self.norms = BlockNorms(blocks)
        self.record: Record | None = None
        if options.compile != "off":
            self.model.compile_step(graphs=options.compile == "graphs")
        self.step_model = self.model
        if world.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.step_model = DistributedDataParallel(self.model, device_ids=devices)

    # ---- state ------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """All that the run is, as plain data and tensors."""
        return {
            "format": checkpoint.FORMAT,
            **self.identity,
            "epoch": self.epoch,
            "step": self.step,
            "global_step": self.global_step,
            "best": self.best,
            "network": self.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "ema_updates": int(self.ema.n_averaged) if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state() if self.guard else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def resume(self) -> list[str]:
        """Continue from the folder's newest checkpoint that is whole.

        Returns:
            Lines about what was wrong with a newer one, and about what has changed since.

        Raises:
            UserError: there is none, or it is of another model, or too much has changed.
        """
        path, told = self.world.from_main(self._newest)
        self.load_state(checkpoint.load(path), path)
        return told

    def _newest(self) -> tuple[Path, list[str]]:
        """The checkpoint to continue from, and lines about it; a newer one that can't be used gets out of the way."""
        disk.remove_temporary(self.folder)
        told = []
        last, refused = self.folder / "last.pt", self.folder / "refused.pt"
        for path in (path for path in (last, self.folder / "previous.pt") if path.exists()):
            try:
                state = checkpoint.load(path)
                self._check_state(state, path)
            except UserError as error:
                told.append(str(error))
                continue
            changed = resume.check(state, self.identity)
            if told:
                with disk.writing(refused):
                    last.replace(refused)
                told.append(f"it is {refused} now; going on from the checkpoint before, {path}")
            return path, told + changed
        raise UserError("\n".join(told))

    def _check_state(self, state: dict, where: Path) -> None:
        """Find what would make `load_state` fail.

        Raises:
            UserError: it is of another model, or none to continue from.
        """
        wrong = [name for name, kind in _KINDS.items() if not isinstance(state.get(name, ...), kind)]
        if wrong:
            raise UserError(f"{where}: not what a run can be continued from: no usable {', '.join(wrong)} in it")
        if state["inet"] != self.options.inet:
            raise UserError(f"{where}: a checkpoint of {state['inet']}, but --inet is {self.options.inet}")
        if bool(state["ema"]) != bool(self.ema):
            raise UserError(f"{where}: written {'with' if state['ema'] else 'without'} --ema; resume likewise")
        for part in ("network", "ema"):
            if state[part]:
                checkpoint.check_fit(self.network.state_dict(), state[part], str(where))
                checkpoint.check_finite(state[part], f"{where}, {part}")

    def load_state(self, state: dict, where: Path) -> None:
        """Continue from a `state`.

        Raises:
            UserError: it is of another model.
        """
        self._check_state(state, where)
        self._load_weights(state)
        if self.guard and state.get("guard"):
            self.guard = Guard(**state["guard"])
        self.epoch, self.global_step = state["epoch"], state["global_step"]
        # On another number of processes, or with other batches, a step is another number of samples.
        samples = state["step"] * state.get("samples_per_step", self.samples_per_step)
        self.step = min(samples // self.samples_per_step, self.steps_per_epoch)
        self.best, self.saved = state["best"], self.global_step
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def _load_weights(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        # Its settings are the options' (which --resume force may have changed), but for the rate, which each step sets.
        groups = [
            ours | {"lr": saved["lr"]}
            for ours, saved in zip(
                self.optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"], strict=True
            )
        ]
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["ema_updates"])

    def _save(self, name: str = "last", everything: bool = True) -> None:
        if not self.world.is_main:
            return
        state = self.state()
        if not everything:
            state = {key: value for key, value in state.items() if key not in {"optimizer"}}
        previous = self.folder / "previous.pt" if name == "last" else None
        checkpoint.save(state, self.folder / f"{name}.pt", previous)
        if name == "last":
            self.saved = self.global_step
        if name == "last" and self.guard and self.guard.is_calm(self.global_step):
            checkpoint.link(self.folder / "last.pt", self.folder / "good.pt")

    def _keep_newest(self) -> None:
        """Of --save_every's checkpoints, only --keep; the newest is safe by now."""
        if self.options.keep and self.world.is_main:
            numbered = sorted(self.folder.glob("epoch_*.pt"), key=lambda path: (len(path.name), path.name))
            for path in numbered[: -self.options.keep]:
                with disk.writing(path):
                    path.unlink()

    def check_room(self) -> None:
        """See whether the run's checkpoints will fit onto the disk, the one that is being written included.

        Raises:
            UserError: they won't.
        """
        epochs, every, keep = self.options.nEpochs, self.options.save_every, self.options.keep
        weights = sum(value.nbytes for value in self.network.state_dict().values()) * (2 if self.ema else 1)
        whole = weights + 2 * sum(parameter.nbytes for parameter in self.network.parameters())  # Adam's two means
        sizes = {"last": whole, "previous": whole, "best": weights} | ({"good": whole} if self.guard else {})
        kept = range(every, epochs + 1, every)[-keep:] if every else ()
        sizes |= {f"epoch_{epoch:03}": whole for epoch in kept}
        paths = [self.folder / f"{name}.pt" for name in sizes]
        there = {found.st_ino: found.st_size for found in (path.stat() for path in paths if path.exists())}
        if epochs:
            disk.require(self.folder, sum(sizes.values()) + whole - sum(there.values()))

    # ---- training ---------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until --nEpochs are done, evaluating after each; with none to do, evaluate once.

        Raises:
            Interrupted: after a signal, with the state saved.
            Diverged: with the state and the batch saved.
            UserError: the memory is not enough, with the state saved.
        """
        self.record = Record(self.folder, self.options, self.epoch, self.global_step, self.world.is_main)
        with Interrupt() as self.interrupt, contextlib.closing(self.record), self.world.watched(self.folder):
            if self.options.nEpochs == 0:
                self._evaluate_all(self.epoch)
            elif self.guard and not (self.folder / "good.pt").exists():
                self._save()
            while self.epoch < self.options.nEpochs:
                self.train_one_epoch()
                self._finish_epoch()

    def train_one_epoch(self) -> None:
        """The steps of an epoch that are still to do."""
        options = self.options
        self.loaders.train.batch_sampler.seek(self.epoch, self.step * options.accumulate)
        batches = iter(self.loaders.train)
        title = f"epoch {self.epoch + 1}/{options.nEpochs}"
        progress = Progress(title, self.steps_per_epoch, self.step, quiet=not self.world.is_main)
        window = _Window(self.device)
        self.model.train()
        while self.step < self.steps_per_epoch:
            began = time.perf_counter()
            group = self._next(batches)
            window.waited += time.perf_counter() - began
            due = (self.global_step + 1) % options.log_every == 0 or self.step + 1 == self.steps_per_epoch
            if self.norms:
                self.norms.watching = due
            with enough_memory(self._saved_and_what_fits):
                terms, norm = self._gradient(group)
            with enough_memory(self._what_fits):  # not saved: some weights may have had their step
                verdict = self._apply(norm)
            self.step += 1
            self.global_step += 1
            if verdict is Verdict.STEP:
                window.add(terms, norm, sum(len(batch["name"]) for batch in group) * self.world.size)
            else:
                progress.say(self._after_skip(verdict, norm.item()))
            if due:
                norms = self.norms.values() if self.norms else {}
                values = window.values(self.world) | norms | self._faults() | {"train/lr": self._rate()}
                self.record.scalars(self.global_step, values)
                window = _Window(self.device)
            progress.step(f"loss {float(sum(terms.values())):.4f}, lr {self._rate():.2e}")
            self._stop_if_asked()
            if options.save_steps and self.step % options.save_steps == 0:
                self._save()
        progress.close()
        self._save()

    def _next(self, batches: Iterator[dict]) -> list[dict]:
        """The batches of a step.

        Raises:
            UserError: they can't be had; with the state saved.
        """
        group, trouble = [], None
        try:
            group = [next(batches) for _ in range(self.options.accumulate)]
        except UserError as error:
            trouble = error
        self._stop_for(trouble)
        return group

    def _stop_for(self, trouble: UserError | None) -> None:
        """Save the state and stop, if any process has trouble with its data."""
        if self.world.any(trouble is not None):
            told = str(trouble or "another process cannot read its data")
            if self.options.nEpochs:
                self._save()
                self.world.barrier()
                told += f"; saved after step {self.global_step}; --resume continues {self.folder}"
            raise UserError(told) from trouble

    def _faults(self) -> dict[str, float]:
        """What the data's loaders of all processes have had to put right in this epoch."""
        faults = self.loaders.train.faults
        counts = self.world.mean(torch.tensor([*faults.values()], dtype=torch.float32, device=self.device))
        return {f"data/{name}": count * self.world.size for name, count in zip(faults, counts.tolist(), strict=True)}

    def _gradient(self, group: list[dict]) -> tuple[dict[str, Tensor], Tensor]:
        """The mean of the loss's terms over the group's batches; its gradient, clipped; the norm it had before."""
        self.optimizer.zero_grad(set_to_none=True)
        means: dict[str, Tensor] = defaultdict(float)
        for number, batch in enumerate(group, start=1):
            # Gradients are exchanged between processes once, with the group's last batch.
            last = number == len(group) or self.world.size == 1
            with contextlib.nullcontext() if last else self.step_model.no_sync():
                terms = self.step_model(*(self._move(batch[key]) for key in ("mixture", "target_t", "target_r")))
                loss = sum(terms.values()) / len(group)
                for key, value in terms.items():
                    means[key] = means[key] + value.detach() / len(group)
                if self.world.any(not math.isfinite(loss.item())):
                    if self.guard:
                        return means, torch.tensor(math.nan)
                    self._give_up("loss", [batch], terms)
                loss.backward()
        most = self.options.grad_clip or math.inf
        if self.guard:
            most = min(most, self.guard.limit(self.guard.CLIP))
        norm = nn.utils.clip_grad_norm_([p for p in self.network.parameters() if p.grad is not None], most)
        if not self.guard and not math.isfinite(norm.item()):  # the same in all processes
            self._give_up("gradient", group, means)
        return means, norm

    def _apply(self, norm: Tensor) -> Verdict:
        """The optimiser's step, unless the guard finds the gradient's norm far from what it usually is."""
        verdict = self.guard.judge(self.global_step, norm.item()) if self.guard else Verdict.STEP
        if verdict is Verdict.STEP:
            for settings in self.optimizer.param_groups:
                settings["lr"] = self._rate()
            self.optimizer.step()
            if self.ema:
                self.ema.update_parameters(self.network)
        return verdict

    def _after_skip(self, verdict: Verdict, norm: float) -> str:
        """Carry out the guard's verdict on a skipped step; return a message.

        Raises:
            Diverged: it has returned often enough.
        """
        guard, step = self.guard, self.global_step
        message = guard.describe_skip(step, norm)
        if verdict is Verdict.RETURN:
            if guard.is_exhausted():
                raise Diverged(f"{message}; {guard.describe_end(self.folder / 'good.pt')}")
            self.world.barrier()  # the main process may still be writing it
            good = checkpoint.load(self.folder / "good.pt")
            self._load_weights(good)
            guard.returned()
            message += f"; {guard.describe_return(good['global_step'])}"
        self.record.scalars(step, {"guard/skipped_norm": norm, "guard/rate": guard.rate})
        return message

    def _rate(self) -> float:
        rate = learning_rate(self.global_step, self.options, self.options.nEpochs * self.steps_per_epoch)
        return rate * self.guard.rate if self.guard else rate

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _stop_if_asked(self) -> None:
        """Where all processes are at the same point: end if a signal has come to any of them."""
        if self.world.any(self.interrupt.signal is not None):
            self._save()
            self.world.barrier()
            raise Interrupted(self.interrupt.signal or 15)

    def _give_up(self, what: str, batches: list[dict], terms: dict[str, Tensor]) -> None:
        """Save what is needed to look at a loss or a gradient that isn't finite, and stop."""
        values = {key: value.item() for key, value in terms.items()}
        path = self.folder / f"nonfinite_step_{self.global_step}_rank_{self.world.rank}.pt"
        tensors = {key: torch.cat([batch[key] for batch in batches]) for key in ("mixture", "target_t", "target_r")}
        names = [name for batch in batches for name in batch["name"]]
        checkpoint.save(self.state() | {"batch": tensors, "names": names, "terms": values}, path)
        told = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        raise Diverged(
            f"the {what} of step {self.global_step} is not finite (losses: {told}); the batch: {', '.join(names)}; "
            f"weights, optimiser and batch of that step are in {path}: tools/replay.py shows where it begins"
        )

    def _saved_and_what_fits(self) -> str:
        self._save()
        return f"{self._what_fits()}; saved before that step: --resume goes on there"

    def _what_fits(self) -> str:
        return less_memory_for_a_step(self.options, self.device, self.global_step)

    # ---- evaluation -------------------------------------------------------------------------------------------

    def _finish_epoch(self) -> None:
        """Evaluate, record, keep the checkpoints."""
        epoch = self.epoch + 1
        self._evaluate_all(epoch)
        score = self.record.latest("val" if self.options.best_by == "val" else "average")
        score = self.world.share(score)
        self.epoch, self.step = epoch, 0
        if score is not None and (self.best is None or score > self.best):
            self.best = score
            self._save("best", everything=False)
        if self.options.save_every and epoch % self.options.save_every == 0:
            self._save(f"epoch_{epoch:03}")
            self._keep_newest()
        self._save()

    def _evaluate_all(self, epoch: int) -> None:
        sets = ({"val": self.loaders.val} if self.loaders.val else {}) | self.loaders.tests
        self.record.start_evaluation(epoch, sets)
        for name, loader in sets.items():
            began = time.perf_counter()
            rows, panels = self.evaluate(loader, name)
            rows = self.world.gather(rows)
            self.record.evaluation(epoch, self.global_step, name, rows, time.perf_counter() - began)
            self.record.panel(self.global_step, name, panels)
        self.record.averages(epoch, self.global_step)
        if self.world.is_main:
            lines = [line for line in self.record.lines if line["epoch"] == epoch and line["estimate"] == "model"]
            told = "  ".join(f"{line['set']} {line['PSNR']:.2f}/{line['SSIM']:.3f}" for line in lines)
            print(f"epoch {epoch}: {told}", flush=True)

    def evaluate(self, loader: Loader, name: str) -> tuple[list[dict], list[np.ndarray]]:
        """Metrics of every image of a set, and pictures of its first ones.

        The metrics are computed, and pictures written, in threads beside a GPU's forward passes; a CPU's use all cores
        themselves, and go slower beside threads by more than these take.

        Returns:
            Rows as `Record.evaluation` takes them, by name, and --panels rows of a picture.

        Raises:
            UserError: an image can't be read, without which the means would be others; with the state saved.
        """
        self.model.eval()
        network = self.ema.module if self.ema else None
        jobs, panels = [], []

        troubles: list[UserError] = []

        def predict(image: Tensor) -> tuple[Tensor, ...]:
            with enough_memory(lambda: less_memory_for_images(tuple(image.shape), name, self.device)):
                return self.model.predict(self._move(image), network)

        def until_trouble(batches: Iterable[dict]) -> Iterator[dict]:
            # Processes have different numbers of images, so they can only afterwards agree to stop.
            try:
                yield from batches
            except UserError as error:
                troubles.append(error)

        batches = track(until_trouble(loader), f"evaluating {name}", len(loader), quiet=not self.world.is_main)
        with ThreadPoolExecutor(4) as pool:
            start = _at_once if self.device.type == "cpu" else pool.submit
            for one in separate(batches, predict):
                jobs.append((one.name, start(measure, one)))
                if self.options.save_images:
                    stem = self.folder / "images" / name / one.name
                    jobs += [
                        (None, start(_write, stem, kind, x))
                        for kind, x in (("t", one.transmission), ("r", one.reflection))
                    ]
                if len(panels) < self.options.panels:
                    tiles = (one.mixture, one.transmission, one.target_t, one.reflection, one.target_r)
                    tiles = (*tiles, one.residue / 2 + 0.5)
                    panels.append(np.concatenate([_picture(tile) for tile in tiles], axis=1))
                if self.interrupt.signal is not None:
                    break  # the other processes learn of it behind the set: they may have fewer images
            done = [(image_name, job.result()) for image_name, job in jobs]
        self._stop_if_asked()
        self._stop_for(troubles[0] if troubles else None)
        rows = [{"name": image_name} | metrics for image_name, metrics in done if image_name]
        return sorted(rows, key=lambda row: row["name"]), panels


class _Window:
    """Means of what training does between two points of TensorBoard's curves."""

    def __init__(self, device: torch.device):
        self.device = device
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = self.images = 0
        self.sums: dict[str, Tensor] = defaultdict(float)

    def add(self, terms: dict[str, Tensor], norm: Tensor, images: int) -> None:
        self.steps += 1
        self.images += images
        for key, value in {**terms, "total": sum(terms.values())}.items():
            self.sums[f"train/loss_{key}"] = self.sums[f"train/loss_{key}"] + value
        self.sums["train/gradient_norm"] = self.sums["train/gradient_norm"] + norm

    def values(self, world: World) -> dict[str, float]:
        means = []
        if self.steps:
            means = world.mean(torch.stack([value.detach() for value in self.sums.values()]) / self.steps).tolist()
        seconds = time.perf_counter() - self.began
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:  # the process's peak, in KiB on Linux and in bytes on macOS
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return dict(zip(self.sums, means, strict=True)) | {
            "speed/images_per_second": self.images / seconds,
            "speed/seconds_waited_for_data": self.waited,
            "speed/share_waiting_for_data": self.waited / seconds,
            "speed/peak_memory_GiB": memory / 2**30,
        }


def _at_once(job: Callable, *arguments: object) -> Future:
    """As an executor's `submit`, without a thread."""
    future = Future()
    future.set_result(job(*arguments))
    return future


def _write(stem: Path, kind: str, image: Tensor) -> None:
    """A (3, H, W) picture of a test image, as PNG."""
    with disk.writing(stem.parent):
        stem.parent.mkdir(parents=True, exist_ok=True)
    write_image(stem.with_name(f"{stem.name}_{kind}.png"), image.permute(1, 2, 0).numpy())


def _picture(image: Tensor) -> np.ndarray:
    """(3, H, W) to (H, W + 8, 3) in 0..1, with a white margin."""
    return np.pad(image.clamp(0, 1).permute(1, 2, 0).numpy(), ((0, 0), (0, 8), (0, 0)), constant_values=1.0)
