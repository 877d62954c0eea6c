"""Engine: the training loop, the evaluation after every epoch, and the state that both leave."""

import contextlib
import itertools
import math
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dereflect.data import Loaders
from dereflect.data.loader import Loader
from dereflect.models.arch.blocks import Block
from dereflect.util.device import (
    enough_memory,
    less_memory_for_a_step,
    less_memory_for_images,
    random_states,
    set_random_states,
)
from dereflect.util.distributed import World
from dereflect.util.errors import UserError
from dereflect.util.evaluation import Separated, measure, measure_images, separate_batches, write_layers
from dereflect.util.optim import build_optimizer, learning_rate, load_optimizer
from dereflect.util.program import Interrupt, Interrupted
from dereflect.util.progress import Progress, track
from dereflect.util.published import AVERAGE
from dereflect.util.run import checkpoint, resume
from dereflect.util.run.folder import RunFolder
from dereflect.util.run.record import Record, TrainingMeans
from dereflect.util.stability import BlockNorms, Guard, Verdict

_BATCH = ("mixture", "target_t", "target_r")


class Diverged(Exception):
    """A loss or a gradient wasn't finite, or the guard could not hold the training; the message says what to do."""


class Engine:
    """Trains a model and keeps everything about the run.

    Args:
        options: of `options.parse_train`.
        model: of `models.build_model`; moved to the world's device.
        loaders: the data.
        world: this process among all.
        folder: of the run.
    """

    def __init__(self, options: Namespace, model: nn.Module, loaders: Loaders, world: World, folder: RunFolder):
        self.options, self.loaders, self.world, self.folder = options, loaders, world, folder
        self.device = world.device
        self.model = model.to(self.device)
        self.network: nn.Module = model.network
        self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(options.ema)) if options.ema else None
        self.optimizer = build_optimizer(self.network, options)
        self.samples_per_step = options.batchSize * options.accumulate * world.size
        self.identity = resume.identity(options, loaders.files, self.samples_per_step)
        self.steps_per_epoch = len(loaders.train) // options.accumulate if loaders.train is not None else 0
        self.epoch = 0  # epochs done, evaluation included
        self.step = 0  # steps of the optimiser done in the current epoch
        self.global_step = 0
        self.best: float | None = None
        self.saved: int | None = None  # step of the newest checkpoint
        self.guard = Guard() if options.guard else None
        blocks = {name: part for name, part in self.network.named_modules() if isinstance(part, Block)}
        self.untouched: dict[tuple[str, str], dict[str, float]] = {}  # metrics of the input, by set and image
        self.norms = BlockNorms(blocks) if options.log_norms else None
        if options.compile != "off":
            self.model.compile_step(graphs=options.compile == "graphs")
        self.step_model = world.parallel(self.model)

    # ---- training ---------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until --nEpochs are done, and evaluate after each of them, and also what the training starts from.

        Raises:
            Interrupted: after a signal, with the state saved.
            Diverged: with the state and the batch saved.
            UserError: the memory is not enough, with the state saved.
        """
        self.record = Record(self.folder.path, self.options, self.epoch, self.global_step, self.world.is_main)
        with Interrupt() as self.interrupt, contextlib.closing(self.record), self.world.watched(self.folder.path):
            if self.options.nEpochs == 0 or (self.options.weight_path and not self.global_step):
                self._evaluate_all(self.epoch)
                self._keep_best()
            if self.options.nEpochs and self.guard and not self.folder.good.exists():
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
        means = TrainingMeans(self.device)
        self.model.train()
        while self.step < self.steps_per_epoch:
            began = time.perf_counter()
            group = self._next(batches)
            means.waited += time.perf_counter() - began
            due = (self.global_step + 1) % options.log_every == 0 or self.step + 1 == self.steps_per_epoch
            if self.norms:
                self.norms.watching = due
            with enough_memory(self._save_and_advise):
                terms, norm = self._gradient(group)
            with enough_memory(self._advise):  # not saved: some weights may have had their step
                verdict = self._apply(norm)
            self.step += 1
            self.global_step += 1
            if verdict is Verdict.STEP:
                means.add(terms, norm, sum(len(batch["name"]) for batch in group) * self.world.size)
            else:
                progress.log(self._after_skip(verdict, norm.item()))
            if due:
                values = means.values(self.world, self.loaders.train.faults) | {"train/lr": self._rate()}
                self.record.scalars(self.global_step, values | (self.norms.values() if self.norms else {}))
                means = TrainingMeans(self.device)
            progress.step(f"loss {float(sum(terms.values())):.4f}, lr {self._rate():.2e}")
            self._stop_if_asked()
            if options.save_steps and self.step % options.save_steps == 0:
                self._save()
        progress.close()
        self._save()

    def _next(self, batches: Iterator[dict]) -> list[dict]:
        """The batches of a step.

        Raises:
            UserError: they can't be read; with the state saved.
        """
        try:
            group, trouble = [next(batches) for _ in range(self.options.accumulate)], None
        except UserError as error:
            group, trouble = [], error
        self._stop_for(trouble)
        return group

    def _gradient(self, group: list[dict]) -> tuple[dict[str, Tensor], Tensor]:
        """The mean of the loss's terms over the group's batches; its gradient, clipped; the norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        means: dict[str, Tensor] = defaultdict(float)
        for number, batch in enumerate(group, start=1):
            # Gradients are exchanged between processes once, with the group's last batch.
            last = number == len(group) or self.world.size == 1
            with contextlib.nullcontext() if last else self.step_model.no_sync():
                terms = self.step_model(*(batch[key].to(self.device, non_blocking=True) for key in _BATCH))
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

    def _rate(self) -> float:
        rate = learning_rate(self.global_step, self.options, self.options.nEpochs * self.steps_per_epoch)
        return rate * self.guard.rate if self.guard else rate

    # ---- what may end a training ------------------------------------------------------------------------------

    def _after_skip(self, verdict: Verdict, norm: float) -> str:
        """Carry out the guard's verdict on a skipped step; return a message.

        Raises:
            Diverged: the guard has no return left.
        """
        guard, step = self.guard, self.global_step
        message = guard.describe_skip(step, norm)
        if verdict is Verdict.RETURN:
            if guard.is_exhausted():
                raise Diverged(f"{message}; {guard.describe_end(self.folder.good)}")
            self.world.barrier()  # the main process may still be writing it
            good = checkpoint.load(self.folder.good)
            resume.check_usable(good, self.folder.good, self.options, self.network.state_dict(), self.optimizer)
            self._load_weights(good)
            guard.returned()
            message += f"; {guard.describe_return(good['global_step'])}"
        self.record.scalars(step, {"guard/skipped_norm": norm, "guard/rate": guard.rate})
        return message

    def _stop_for(self, trouble: UserError | None) -> None:
        """Save the state and stop, if any process has trouble with its data."""
        if self.world.any(trouble is not None):
            message = str(trouble or "another process cannot go on (its own message says why)")
            if self.options.nEpochs:
                self._save()
                self.world.barrier()
                message += f"; saved after step {self.global_step}; --resume continues {self.folder.path}"
            raise UserError(message) from trouble

    def _stop_if_asked(self) -> None:
        """Stop if any process has received a signal; called where all processes are at the same point."""
        if self.world.any(self.interrupt.signal is not None):
            self._save()
            self.world.barrier()
            raise Interrupted(self.interrupt.signal or 15)

    def _give_up(self, what: str, batches: list[dict], terms: dict[str, Tensor]) -> None:
        """Save what is needed to look at a loss or a gradient that isn't finite, and stop."""
        values = {key: value.item() for key, value in terms.items()}
        path = self.folder.nonfinite(self.global_step, self.world.rank)
        tensors = {key: torch.cat([batch[key] for batch in batches]) for key in _BATCH}
        names = [name for batch in batches for name in batch["name"]]
        checkpoint.save(self.state() | {"batch": tensors, "names": names, "terms": values}, path)
        listed = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        raise Diverged(
            f"the {what} of step {self.global_step} is not finite (losses: {listed}); the batch: {', '.join(names)}; "
            f"weights, optimiser and batch of that step are in {path}: tools/replay.py shows where it begins"
        )

    def _save_and_advise(self) -> str:
        self._save()
        return f"{self._advise()}; saved before that step: --resume goes on there"

    def _advise(self) -> str:
        return less_memory_for_a_step(self.options, self.device, self.global_step)

    # ---- evaluation -------------------------------------------------------------------------------------------

    def _finish_epoch(self) -> None:
        """Evaluate, and keep the checkpoints."""
        self._evaluate_all(self.epoch + 1)
        self.epoch, self.step = self.epoch + 1, 0
        self._keep_best()
        if (every := self.options.save_every) and self.epoch % every == 0 and self.world.is_main:
            self.folder.save_epoch(self.state(), self.epoch, self.options.keep)
        self._save()
        self.record.epochs_done(self.epoch)

    def _evaluate_all(self, epoch: int) -> None:
        sets = ({"val": self.loaders.val} if self.loaders.val is not None else {}) | self.loaders.tests
        self.record.start_evaluation(epoch, self.global_step, sets)
        for name, loader in sets.items():
            began = time.perf_counter()
            rows, shown = self.evaluate(loader, name)
            rows = self.world.gather(rows)
            self.record.evaluation(epoch, self.global_step, name, rows, time.perf_counter() - began)
            self.record.panel(self.global_step, name, shown)
        self.record.averages(epoch, self.global_step)
        if self.world.is_main and sets:
            print(f"epoch {epoch}: {self.record.scores(epoch)}", flush=True)

    def _keep_best(self) -> None:
        score = self.world.share(self.record.latest("val" if self.options.best_by == "val" else AVERAGE))
        if self.options.nEpochs and score is not None and score > (-math.inf if self.best is None else self.best):
            self.best = score
            if self.world.is_main:
                self.folder.save_best(self.state())

    def evaluate(self, loader: Loader, name: str) -> tuple[list[dict], list[Separated]]:
        """Evaluate a set.

        Returns:
            Rows as of `util.evaluation.measure_images`, and the first --panels images.

        Raises:
            UserError: an image can't be read, so that the means would not be those of the set, or there is no memory or
                disk for one; with the state saved.
        """
        self.model.eval()
        network = self.ema.module if self.ema else None

        def batches() -> Iterator[dict]:
            for batch in track(loader, f"evaluating {name}", len(loader), quiet=not self.world.is_main):
                yield batch
                if self.interrupt.signal is not None:
                    return

        def predict(mixture: Tensor) -> tuple[Tensor, ...]:
            with enough_memory(lambda: less_memory_for_images(tuple(mixture.shape), name, self.device)):
                return self.model.predict(mixture.to(self.device, non_blocking=True), network)

        def measure_and_write(one: Separated) -> dict[str, dict[str, float]]:
            if self.options.save_images:
                write_layers(one, self.folder.layers(name, one.name))
            return measure(one, self.untouched.get((name, one.name)))

        rows, shown, trouble = [], [], None
        try:  # processes have different numbers of images, or none: only after the set can they agree to stop
            images = separate_batches(batches(), predict)
            shown = list(itertools.islice(images, self.options.panels))
            rows = measure_images(itertools.chain(shown, images), self.device, measure_and_write)
            self.untouched |= {(name, row["name"]): row["input"] for row in rows}
        except UserError as error:
            trouble = error
        self._stop_if_asked()
        self._stop_for(trouble)
        return rows, shown

    # ---- state ------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """The whole state of the run, as plain values and tensors."""
        return {
            "format": checkpoint.FORMAT,
            **self.identity,
            **{key: getattr(self, key) for key in ("epoch", "step", "global_step", "best")},
            "network": self.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "ema_updates": int(self.ema.n_averaged) if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state() if self.guard else None,
            **random_states(self.device),
        }

    def _save(self) -> None:
        if self.world.is_main:
            self.folder.save_last(self.state(), bool(self.guard and self.guard.is_calm(self.global_step)))
            self.saved = self.global_step

    def resume(self) -> list[str]:
        """Continue from the folder's newest usable checkpoint.

        Returns:
            Lines about what was wrong with a newer one, and about what has changed since.

        Raises:
            UserError: there is none, or it is of another model, or too much has changed.
        """
        state, messages = self.folder.load_newest(self.world, self.options, self.network, self.optimizer, self.identity)
        self._load_weights(state)
        if self.guard and state.get("guard"):
            self.guard = Guard(**state["guard"])
        self.epoch, self.global_step = state["epoch"], state["global_step"]
        # On another number of processes, or with other batches, a step is another number of samples.
        samples = state["step"] * state.get("samples_per_step", self.samples_per_step)
        self.step = min(samples // self.samples_per_step, self.steps_per_epoch)
        self.best, self.saved = state["best"], self.global_step
        set_random_states(state, self.device)
        return messages

    def _load_weights(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["ema_updates"])
