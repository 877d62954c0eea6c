"""Train a reflection removal network, evaluating it after every epoch: parse, build, fit."""

import logging
import os
import sys
from pathlib import Path

from options import parse_train
from util.console import never_fail
from util.errors import UserError
from util.interrupt import Interrupt, Interrupted


def main() -> int:
    """The program; returns its exit status."""
    never_fail()
    options = parse_train()
    try:
        with Interrupt(at_once=True):  # until `Engine.fit` has something to save
            # Only now, so that --help and a mistyped option answer at once.
            from models.arch import list_models

            if options.list_models:
                print("\n".join(list_models()))
                return 0
            return train(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"stopped by {stop.signal} while not training; nothing is lost")
        return 128 + stop.number


def train(options) -> int:
    """Build everything that the options describe, and fit.

    Returns:
        0; 1 after a training that diverged; 128 + the signal's number after a signal.

    Raises:
        UserError: for what a user can put right.
    """
    from engine import Diverged, Engine
    from models import build_model
    from models.arch import list_models
    from util import checkpoint
    from util.allocator import keep_freed_memory
    from util.distributed import join, wants_bf16
    from util.records import read_metrics, table
    from util.repeatable import make_repeatable

    if options.inet not in list_models():
        raise UserError(f"--inet {options.inet}: there is no such model; there are {', '.join(list_models())}")
    world = join(options.gpu_ids)
    say = print if world.is_main else lambda *_: None
    _choose_scan(options.scan_backend, world)
    folder = Path(world.share(str(_run_folder(options))))
    if folder.name != options.name:
        say(f"There is a run '{options.name}' already; this one is '{folder.name}' (--resume continues that one).")
        options.name = folder.name
    loaders = _load_data(options, world, say)
    _warn(options, say)

    keep_freed_memory()
    make_repeatable(options.seed)
    bf16 = wants_bf16(options.precision, world.device)
    engine = Engine(options, build_model(options, bf16), loaders, world, folder)
    count = sum(parameter.numel() for parameter in engine.network.parameters())
    processes = f", {world.size} processes" if world.size > 1 else ""
    say(f"{options.inet}: {count:,} parameters, {'bf16' if bf16 else 'fp32'} on {world.device}{processes}")
    if options.resume and (folder / "last.pt").exists():
        engine.load_state(checkpoint.load(folder / "last.pt"), folder / "last.pt")
        say(f"resuming {folder} after {engine.epoch} epochs and {engine.step} steps")

    try:
        engine.fit()
    except Interrupted as stop:
        say(f"stopped by {stop.signal}; saved after step {engine.global_step}; --resume continues {folder}")
        return 128 + stop.number
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        world.close()
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


def _load_data(options, world, say):
    """The data that the options name, or the demo set, checked and told; as the engine takes it."""
    import data
    from data.demo import build_demo
    from engine import Loaders

    if options.demo:
        say("No --base_dir given and no ./dataset/reflection-removal here: training on the embedded demo set,")
        say(f"in {options.base_dir}, with a shortened schedule. The README says how to get the real data.")
        if world.is_main:
            build_demo(options.base_dir)
        world.barrier()
    sets = data.discover(options)
    for line in sets.describe():
        say(line)
    return Loaders(
        data.build_train_loader(options, sets, world.rank, world.size) if options.nEpochs else None,
        data.build_val_loader(options, sets, world.rank, world.size),
        data.build_test_loaders(options, sets, world.rank, world.size),
    )


def _warn(options, say) -> None:
    if options.vgg_weights == "random":
        say("WARNING: VGG19 has random weights (--vgg_weights random). Good for trying things out, not for results:")
        say("         the pyramid's features and the perceptual loss mean little without ImageNet's.")
    if options.best_by == "test":
        say("WARNING: --best_by test picks the best epoch on the test sets, which flatters their results.")


def _run_folder(options) -> Path:
    """Where the run is kept: its name's folder, or with a number behind it when that holds another run."""
    folder = options.checkpoints_dir / options.name
    if options.resume:
        if options.resume == "must" and not (folder / "last.pt").exists():
            runs = sorted(path.parent.name for path in options.checkpoints_dir.glob("*/last.pt"))
            raise UserError(
                f"--resume: {folder}/last.pt does not exist; runs that can be resumed: {', '.join(runs) or 'none'} "
                "(--resume auto starts anew where there is nothing)"
            )
        return folder
    number = 2
    while folder.exists():
        folder = options.checkpoints_dir / f"{options.name}-{number}"
        number += 1
    return folder


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
    sys.exit(main())
