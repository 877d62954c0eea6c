"""Train a reflection removal network, evaluating it after every epoch: parse, build, fit."""

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial

from dereflect.options import PRETRAINED, parse_train
from dereflect.util.errors import UserError
from dereflect.util.program import Interrupted, run


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status, see `train`."""
    return train(parse_train(argv))


def train(options) -> int:
    """Build everything that the options describe, and fit.

    Returns:
        0; 1 after a training that diverged; 128 + the signal's number after a signal.

    Raises:
        UserError: for what a user can put right.
    """
    # Only now, so that --help and a mistyped option answer at once.
    from dereflect import models
    from dereflect.data import build_loaders
    from dereflect.engine import Engine
    from dereflect.models import views
    from dereflect.models.arch import list_models
    from dereflect.util.device import keep_freed_memory, set_deterministic, wants_bf16
    from dereflect.util.distributed import join
    from dereflect.util.run.folder import RunFolder, check_resumable

    if options.list_models:
        print("\n".join(list_models()))
        return 0
    if options.inet not in list_models():
        raise UserError(f"--inet {options.inet}: there is no such model; there are {', '.join(list_models())}")
    views.check(options.sizes or ())
    world = join(options.gpu_ids)
    log = print if world.is_main else lambda *_: None
    choose_backends(options, world)
    world.from_main(lambda: check_resumable(options))
    loaders = build_loaders(options, world, log)
    with RunFolder.open(options, world, log) as folder:
        options.name = folder.path.name
        keep_freed_memory()
        set_deterministic(options.seed)
        bf16 = wants_bf16(options.precision, world.device)
        model = models.build_model(options, bf16)
        warn(options, model, log)
        engine = Engine(options, model, loaders, world, folder)
        count = sum(parameter.numel() for parameter in engine.network.parameters())
        processes = f", {world.size} processes" if world.size > 1 else ""
        log(f"{options.inet}: {count:,} parameters, {'bf16' if bf16 else 'fp32'} on {world.device}{processes}")
        if options.sizes:
            sides = ", ".join(map(str, options.sizes))
            log(f"its checkpoints state views of {sides} pixels; evaluation here takes images as they are")
        if options.resume and world.share(folder.can_resume()):
            for line in engine.resume():
                log(line)
            log(f"resuming {folder.path} after {engine.epoch} epochs and {engine.step} steps")
            if 0 < options.nEpochs <= engine.epoch:
                log(f"it is finished: --nEpochs is {options.nEpochs}; a larger one trains on, another --name anew")
        world.from_main(folder.lock.confirm)
        world.from_main(lambda: folder.require_room(options, engine.network))
        return fit(engine, log)


def choose_backends(options, world) -> None:
    """Choose what computes the Mamba models' selective scan and the blocks' passes; log the choice at the first use.

    Raises:
        UserError: they can't be computed like that on this machine.
    """
    import torch

    from dereflect.models import check_backends, passes, scan
    from dereflect.models.arch import create_model

    with torch.device("meta"):  # the network without its weights
        network = create_model(options.inet)
    check_backends(network, world.device.type, options.scan_backend, options.passes_backend)
    scan.set_backend(options.scan_backend)
    passes.set_backend(options.passes_backend)
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    for name in ("scan", "passes"):
        logging.getLogger(name).setLevel(logging.INFO if world.is_main else logging.WARNING)


def warn(options, model, log: Callable[[str], None]) -> None:
    """Log what makes the results worth less than they look."""
    from dereflect.models.vgg import Vgg19

    if options.vgg_weights == "random" and any(isinstance(part, Vgg19) for part in model.modules()):
        log("WARNING: VGG19 has random weights (--vgg_weights random). Good for trying things out, not for results:")
        log("         the pyramid's features and the perceptual loss mean little without ImageNet's.")
    if options.demo and options.weight_path == PRETRAINED:
        log("starting from the bundled weights; --weight_path none starts from scratch")
    if options.best_by == "test":
        log("WARNING: --best_by test picks the best epoch on the test sets, which flatters their results.")


def fit(engine, log: Callable[[str], None]) -> int:
    """Train; returns the program's exit status."""
    from dereflect.engine import Diverged
    from dereflect.util.run.reader import best, read_run, table

    path = engine.folder.path
    try:
        engine.fit()
    except Interrupted as stop:
        log(f"stopped by {stop.signal}; saved after step {engine.global_step}; --resume continues {path}")
        return 128 + stop.number
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError:
        if engine.saved is not None:
            log(f"saved last after step {engine.saved}, of {engine.global_step}; --resume continues {path}")
        raise
    finally:
        engine.world.close()
    if engine.world.is_main:
        run = read_run(path)
        picked = [best(run)] if engine.options.nEpochs and best(run) else []
        log("\n".join(["", table(run.lines), *picked, "", *engine.folder.describe()]))
    return 0


program = partial(run, main)
"""The command `dereflect-train` of the installed package."""

if __name__ == "__main__":
    sys.exit(program())
