"""`step` and `memory`: one training step, or one prediction, of the networks in several variants.

A step is: forward, all losses, backward, gradient norm, AdamW. Its floor is the time that its floating-point operations
take at the rate of the machine's matrix product; the share is the floor divided by the time of the step.
"""

import argparse
import functools
import itertools

import numpy as np
import torch

from dereflect.tools.benchmarks import common, machine, operators, output, variants
from dereflect.tools.benchmarks.common import Measurement
from dereflect.tools.benchmarks.output import Row
from dereflect.tools.benchmarks.variants import Images, Variant, Work
from dereflect.util.device import keep_freed_memory, set_deterministic
from dereflect.util.errors import UserError

KINDS = {False: "training step", True: "prediction"}


def run_step(options: argparse.Namespace) -> None:
    device, chosen = prepare(options)
    if options.profile and not options.profile.parent.is_dir():
        raise UserError(f"--profile {options.profile}: there is no such folder")
    if options.operators and (device != "cpu" or chosen[-1].is_compiled):
        raise UserError("--operators: works on a CPU, for variants that aren't compiled")
    rates = machine.ceilings(device)
    kind = KINDS[options.forward_only]
    found = measure(options, chosen, device, options.forward_only)
    add_floors(found, rates, device, options)
    columns = {
        "ms": "{milliseconds:.1f}",
        "min..max": "{fastest:.1f}..{slowest:.1f}",
        "images/s": "{images_a_second:.2f}",
        f"x {chosen[0].name}": "{ratio:.2f}",
        "peak GiB": "{peak_GiB:.3f}",
        "floor ms": "{floor:.1f}",
        "share": "{share:.0%}",
        "ns/pixel": "{nanoseconds_a_pixel:.0f}",
    }
    tables = [output.table(f"{kind} ({device})", found, columns)]
    if options.forward_only and (spread := spreads(found)):
        columns = {"least": "{least:.0f}", "most": "{most:.0f}", "most/least": "{ratio:.2f}"}
        tables.append(output.table("nanoseconds a pixel", spread, columns))
    parts: list[Measurement] = []
    if options.operators:
        work, images = last_work(options, chosen[-1], device)
        rows, parts = operators.by_operator(work, images, rates)
        tables.append(rows)
    header = machine.setting(options, device, rates)
    output.report(options, header, tables, [*found, *parts])
    if options.plot:
        axes = {"milliseconds": "milliseconds", "peak GiB": "peak_GiB"}
        output.draw(plot_rows(found, options), axes, f"A {kind}, {header['machine']}", options.plot)
    if options.profile:
        profile(options, chosen[-1], device)


def run_memory(options: argparse.Namespace) -> None:
    device, chosen = prepare(options)
    rates = machine.ceilings(device)
    found, rows = [], []
    for forward_only, kind in KINDS.items():
        part = measure(options, without_extras(chosen) if forward_only else chosen, device, forward_only)
        for points in common.by_curve(part).values():
            growth = slope(points)
            for m in points:
                m.figures["bytes_a_pixel"] = growth
        rows.append((kind, part, "megapixels", lambda m: m.work / 1e6))
        found += part
    columns = {"peak GiB": "{peak_GiB:.3f}", "bytes/pixel": "{bytes_a_pixel:,.0f}"}
    header = machine.setting(options, device, rates)
    output.report(options, header, [output.table(f"peak memory ({device})", found, columns)], found)
    if options.plot:
        output.draw(rows, {"peak GiB": "peak_GiB"}, f"Peak memory, {header['machine']}", options.plot)


def prepare(options: argparse.Namespace) -> tuple[str, list[Variant]]:
    """Check the options and set up the process as a training does; return the device and the requested variants."""
    device = common.choose_device(options)
    common.check_models(options.inet)
    mamba = [name for name in options.inet if variants.has_mamba(name)]
    names = options.variants or [*([] if mamba or options.against else ["plain"]), *variants.PRECISIONS]
    forward_only = getattr(options, "forward_only", False)
    chosen = [variants.check_variant(name, device, forward_only) for name in dict.fromkeys(names)]
    if mamba and "plain" in names:
        raise UserError(f"--variants plain: has no Mamba layers, and {mamba[0]} has; leave one of them out")
    if options.against:
        chosen.insert(0, Variant(variants.PUBLISHED))
    if options.plot:
        output.import_matplotlib()
    set_deterministic(seed=0)  # the settings of torch that a training runs under
    if options.keep_freed_memory:
        keep_freed_memory()
    return device, chosen


def without_extras(chosen: list[Variant]) -> list[Variant]:
    """The variants that predict differently, each once."""
    return [Variant(name) for name in dict.fromkeys(v.name if v.is_other else v.precision for v in chosen)]


def measure(options: argparse.Namespace, chosen: list[Variant], device: str, forward_only: bool) -> list[Measurement]:
    """Measure every model in every variant at every size and batch, the variants in turn."""
    found = []
    build = variants.prediction if forward_only else variants.training
    for model in options.inet:
        works = {variant.name: build(model, variant, device, options.against, options.training) for variant in chosen}
        for size, batch in itertools.product(options.sizes, options.batches):
            if any(variant.is_compiled for variant in chosen):
                torch.compiler.reset()  # else torch refuses to compile a step for more than a few sizes
            images = variants.random_images(batch, size, device)
            competitors = [
                (blank(KINDS[forward_only], model, name, size, batch), functools.partial(work, images))
                for name, work in works.items()
            ]
            part = common.compare(competitors, options, device, found)
            common.add_ratio(part, part[0])
            for m in (m for m in part if not m.note):
                m.figures["images_a_second"] = 1e3 * batch / m.milliseconds
                m.figures["nanoseconds_a_pixel"] = 1e6 * m.milliseconds / m.work
            found += part
    return found


def blank(kind: str, model: str, variant: str, size: int, batch: int) -> Measurement:
    """An empty measurement for `batch` images at once of size x size pixels."""
    what = {"kind": kind, "model": model, "variant": variant, "size": size, "batch": batch}
    return Measurement(what, batch * size**2)


def add_floors(found: list[Measurement], rates: dict[str, float], device: str, options: argparse.Namespace) -> None:
    """Add figures: FLOPs (of the plain fp32 step, which computes nothing twice), floor (milliseconds) and share.

    Args:
        found: of `measure`.
        rates: FLOP/s of a matrix product by precision.
        device, options: as they were measured.
    """
    counts = {}
    for m in (m for m in found if not m.note):
        model, size = place = m.what["model"], m.what["size"]
        if place not in counts:
            common.progress(f"{model} {size}: counting operations")
            counts[place] = variants.count_flops(model, size, device, options.forward_only, options.training)
            common.progress("")
        if counts[place]:
            flops = counts[place] * m.what["batch"]
            floor = 1e3 * flops / rates[Variant(m.what["variant"]).precision]
            m.figures |= {"flops": flops, "floor": floor, "share": floor / m.milliseconds}


def spreads(found: list[Measurement]) -> list[Measurement]:
    """For each curve, how far the time per pixel varies over sizes and batches."""
    result = []
    for points in common.by_curve(found).values():
        costs = [m.figures["nanoseconds_a_pixel"] for m in points]
        spread = Measurement({key: points[0].what[key] for key in ("model", "variant")}, seconds=[0.0])
        spread.figures = {"least": min(costs), "most": max(costs), "ratio": max(costs) / min(costs)}
        result.append(spread)
    return result


def slope(points: list[Measurement]) -> float | None:
    """Bytes that each additional pixel takes, by least squares; None for fewer than two sizes."""
    if len({m.work for m in points}) < 2:
        return None
    return float(np.polyfit([m.work for m in points], [m.peak for m in points], 1)[0])


def plot_rows(found: list[Measurement], options: argparse.Namespace) -> list[Row]:
    """Plots over the area if sizes vary, over the batch if batches vary."""
    rows = []
    size, batch = options.sizes[0], options.batches[0]
    if len(options.sizes) > 1 or len(options.batches) == 1:
        part = [m for m in found if m.what["batch"] == batch]
        rows.append((f"batch {batch}", part, "megapixels of an image", lambda m: m.what["size"] ** 2 / 1e6))
    if len(options.batches) > 1:
        part = [m for m in found if m.what["size"] == size]
        rows.append((f"{size} x {size}", part, "images at once", lambda m: m.what["batch"]))
    return rows


def last_work(options: argparse.Namespace, variant: Variant, device: str) -> tuple[Work, Images]:
    """The work of the last model, in this variant, and images of the last size and batch."""
    build = variants.prediction if options.forward_only else variants.training
    work = build(options.inet[-1], variant, device, options.against, options.training)
    return work, variants.random_images(options.batches[-1], options.sizes[-1], device)


def profile(options: argparse.Namespace, variant: Variant, device: str) -> None:
    """Write and print what takes the time of the last model, in this variant, at the last size and batch."""
    work, images = last_work(options, variant, device)
    for _ in range(3):  # compile, record graphs, take memory from the system
        work(images)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        common.elapsed(lambda: work(images), device)
    trace.export_chrome_trace(str(options.profile))
    column = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=column, row_limit=20))
