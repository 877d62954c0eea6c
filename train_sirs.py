"""Train a reflection removal network, evaluating it after every epoch: parse, build, fit."""

import itertools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from options import PRETRAINED, parse_train
from util import disk
from util.errors import UserError
from util.program import Interrupted, run


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 1 after a training that diverged."""
    options = parse_train(argv)
    # Only now, so that --help and a mistyped option answer at once.
    from models.arch import list_models

    if options.list_models:
        print("\n".join(list_models()))
        return 0
    return train(options)


def train(options) -> int:
    """Build everything that the options describe, and fit.

    Returns:
        0; 1 after a training that diverged; 128 + the signal's number after a signal.

    Raises:
        UserError: for what a user can put right.
    """
    from data import build_loaders
    from models.arch import list_models
    from util.distributed import join
    from util.run.lock import Lock

    if options.inet not in list_models():
        raise UserError(f"--inet {options.inet}: there is no such model; there are {', '.join(list_models())}")
    world = join(options.gpu_ids)
    say = print if world.is_main else lambda *_: None
    _choose_scan(options.scan_backend, world)
    _check_resume(options)
    loaders = build_loaders(options, world, say)
    folder = world.from_main(lambda: _run_folder(options))
    with Lock(folder) as lock:
        world.from_main(lambda: lock.acquire(say))
        if folder.name != options.name:
            say(f"There is a run '{options.name}' already; this one is '{folder.name}' (--resume continues that one).")
            options.name = folder.name
        engine = _build(options, loaders, world, folder, say)
        world.from_main(lock.confirm)
        world.from_main(engine.check_room)
        return _fit(engine, say)


def _build(options, loaders, world, folder: Path, say):
    """The engine, where the run's last checkpoint has it if it is resumed."""
    from engine import Engine
    from models import build_model
    from util.device import keep_freed_memory, set_deterministic, wants_bf16

    keep_freed_memory()
    set_deterministic(options.seed)
    bf16 = wants_bf16(options.precision, world.device)
    model = build_model(options, bf16)
    if model.vgg is not None and options.vgg_weights == "random":
        say("WARNING: VGG19 has random weights (--vgg_weights random). Good for trying things out, not for results:")
        say("         the pyramid's features and the perceptual loss mean little without ImageNet's.")
    if options.demo and options.weight_path == PRETRAINED:
        say("starting from the weights in the box; --weight_path none starts from scratch")
    if options.best_by == "test":
        say("WARNING: --best_by test picks the best epoch on the test sets, which flatters their results.")
    engine = Engine(options, model, loaders, world, folder)
    count = sum(parameter.numel() for parameter in engine.network.parameters())
    processes = f", {world.size} processes" if world.size > 1 else ""
    say(f"{options.inet}: {count:,} parameters, {'bf16' if bf16 else 'fp32'} on {world.device}{processes}")
    if options.resume and _can_resume(folder):
        for line in engine.resume():
            say(line)
        say(f"resuming {folder} after {engine.epoch} epochs and {engine.step} steps")
    return engine


def _fit(engine, say) -> int:
    """Train; the program's exit status."""
    from engine import Diverged
    from util.run.reader import read_metrics, table

    folder = engine.folder
    try:
        engine.fit()
    except Interrupted as stop:
        say(f"stopped by {stop.signal}; saved after step {engine.global_step}; --resume continues {folder}")
        return 128 + stop.number
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError:
        if engine.saved is not None:
            say(f"saved last after step {engine.saved}, of {engine.global_step}; --resume continues {folder}")
        raise
    finally:
        engine.world.close()
    say("\n" + table(read_metrics(folder)) + "\n")
    _say_where_to_look(folder, say)
    return 0


def _choose_scan(backend: str | None, world) -> None:
    """Have the Mamba models' scan computed as asked for; the choice is logged when a scan first comes."""
    from models.scan import available_backends, set_backend

    if backend not in (None, "auto"):
        reason = available_backends(world.device.type)[backend]
        if reason:
            raise UserError(f"--scan_backend {backend}: {reason}")
    set_backend(backend)
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("scan").setLevel(logging.INFO if world.is_main else logging.WARNING)


def _can_resume(folder: Path) -> bool:
    """Whether there is a checkpoint to continue from."""
    return (folder / "last.pt").exists() or (folder / "previous.pt").exists()


def _check_resume(options) -> None:
    """Say at once that there is nothing to resume, where there must be."""
    runs, name = options.checkpoints_dir, options.name
    if options.resume in ("must", "force") and not _can_resume(runs / name):
        there = sorted(path.parent.name for path in runs.glob("*/last.pt"))
        raise UserError(
            f"--resume: {runs / name}/last.pt does not exist; runs that can be resumed: {', '.join(there) or 'none'} "
            "(--resume auto starts anew where there is nothing)"
        )


def _run_folder(options) -> Path:
    """Make the folder of the run: its name's, or with a number behind it when there is one that isn't resumed."""
    folder = options.checkpoints_dir / options.name
    for number in itertools.count(2):
        with disk.writing(folder):
            try:
                folder.mkdir(parents=True, exist_ok=options.resume is not None)
                return folder
            except FileExistsError:
                folder = options.checkpoints_dir / f"{options.name}-{number}"


def _say_where_to_look(folder: Path, say) -> None:
    tensorboard = Path(sys.executable).with_name("tensorboard")
    tensorboard = os.path.relpath(tensorboard) if tensorboard.exists() else "tensorboard"
    say(f"pictures (mixture, T, its target, R, its target, residue): {folder}/panels/")
    say(f"every figure:          {folder}/metrics.jsonl, {folder}/per_image/")
    weights = [str(path) for path in (folder / "last.pt", folder / "best.pt") if path.exists()]
    if weights:
        say(f"weights:               {', '.join(weights)}")
    say(f"curves and pictures:   {tensorboard} --logdir {folder.parent}")


if __name__ == "__main__":
    sys.exit(run(main))
