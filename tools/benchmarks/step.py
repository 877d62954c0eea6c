"""`step` and `memory`: one training step, or one prediction, of the networks in several variants.

A step is: forward, all losses, backward, gradient norm, AdamW. Its floor is the time that its floating-point operations
would take at the rate of the machine's matrix product; the share is how close it comes to that.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine import parameter_groups
from models.arch import create_model, list_models
from models.arch.dsrnet import STRIDE
from models.arch.mamba import Mamba
from models.dsrnet_model_sirs import DSRNetModel
from models.losses import ReflectionLoss
from models.scan import set_backend
from models.vgg import Vgg19
from options.arguments import natural_float, positive_int
from tools.benchmarks import common
from tools.inspection.costs import FORMULAS
from util.device import keep_freed_memory, set_deterministic
from util.errors import UserError

PRECISIONS = ("fp32", "bf16")
EXTRAS = ("compile", "graphs", "checkpoint")  # that change the training step only
LOOP = "sequential"  # with the scan's plain loop over the pixels
KINDS = {False: "training step", True: "prediction"}

Images = list[Tensor]
"""Mixtures, target transmissions and target reflections, (B, 3, H, W) each."""

Work = Callable[[Images], object]


@dataclass(frozen=True)
class Variant:
    """A way to compute a step."""

    name: str

    @property
    def parts(self) -> set[str]:
        return set(self.name.split("+"))

    @property
    def precision(self) -> str:
        """Of the matrix products, "fp32" or "bf16"."""
        return "bf16" if "bf16" in self.parts else "fp32"

    @property
    def is_plain(self) -> bool:
        return self.name == "plain"

    @property
    def is_compiled(self) -> bool:
        return bool(self.parts & {"compile", "graphs"})


@dataclass
class Measurement:
    """One model in one variant on images of size x size pixels, `batch` at once."""

    model: str
    variant: str
    size: int
    batch: int
    milliseconds: float | None = None  # the median; None where it was left out
    fastest: float | None = None  # milliseconds
    slowest: float | None = None
    repeats: int = 0
    ratio: float | None = None  # the first variant's time over this one's
    peak: float | None = None  # bytes beyond weights and optimiser's state
    flops: int | None = None  # of the plain fp32 step, nothing computed twice
    floor: float | None = None  # milliseconds
    share: float | None = None  # floor over milliseconds
    note: str = ""

    @property
    def pixels(self) -> int:
        return self.batch * self.size**2

    @property
    def images_a_second(self) -> float:
        return 1e3 * self.batch / self.milliseconds

    @property
    def nanoseconds_a_pixel(self) -> float:
        return 1e6 * self.milliseconds / self.pixels

    @property
    def place(self) -> str:
        return f"{self.model},{self.size},{self.batch}"


# Command lines ---------------------------------------------------------------------------------------------


def add_step(commands) -> None:
    parser = commands.add_parser(
        "step",
        help="a training step, or a prediction",
        description="Times forward, losses, backward, gradient norm and AdamW on random images and with random "
        "weights, and takes the peak of its memory beyond weights and optimiser's state. 'share' is how much of the "
        "time the arithmetic would take at the rate of a matrix product in that precision.",
    )
    parser.set_defaults(run=run_step)
    _add_subject(parser, sizes=[224])
    parser.add_argument("--batches", nargs="+", type=positive_int, default=[1], metavar="N",
                        help="images at once (default: 1)")  # fmt: skip
    parser.add_argument("--forward_only", action="store_true",
                        help="only predict, and tell the time a pixel over the sizes")  # fmt: skip
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="at most so many of each")
    common.add_output(parser, plot="time and peak memory over the image's area, over the batch")
    parser.add_argument("--profile", type=Path, metavar="FILE.json",
                        help="trace one step of the last variant there, for chrome://tracing or ui.perfetto.dev, and "
                             "print its costliest operators")  # fmt: skip


def add_memory(commands) -> None:
    parser = commands.add_parser(
        "memory",
        help="peak memory over the size of the images",
        description="Takes the peak memory of the training step and of prediction, at batch 1, beyond weights and "
        "optimiser's state, and its growth: the slope of the line that fits it best.",
    )
    parser.set_defaults(run=run_memory, batches=[1], repeats=1)
    _add_subject(parser, sizes=[64, 128, 192, 256])
    common.add_output(parser, plot="peak memory over the image's area")


def _add_subject(parser: argparse.ArgumentParser, sizes: list[int]) -> None:
    """What is measured, and where."""
    parser.add_argument("--models", nargs="+", default=["dsrnet_s"], metavar="NAME",
                        help=f"of {', '.join(list_models())} (default: dsrnet_s)")  # fmt: skip
    parser.add_argument("--variants", nargs="+", metavar="VARIANT",
                        help="'plain' (tests/plain.py: two passes in fp32, torch's default AdamW, no Mamba), or fp32 "
                             "or bf16 with any of +compile, +graphs (compiled into CUDA graphs) and +checkpoint "
                             "(activations computed again) and +sequential (Mamba's scan as a loop over the "
                             "pixels), such as bf16+compile; ratios are to the first "
                             "(default: plain fp32 bf16)")  # fmt: skip
    parser.add_argument("--sizes", nargs="+", type=positive_int, default=sizes, metavar="PIXELS",
                        help="height and width of the images, multiples of 16 "
                             f"(default: {' '.join(map(str, sizes))})")  # fmt: skip
    parser.add_argument("--max_seconds", type=natural_float, default=60, metavar="S",
                        help="for one variant at one size; what would need more even once is left out "
                             "(default: 60)")  # fmt: skip
    parser.add_argument("--keep_freed_memory", action=argparse.BooleanOptionalAction, default=True,
                        help="have the C library keep what is freed, as training does")  # fmt: skip
    common.add_device(parser)


def run_step(options: argparse.Namespace) -> int:
    device, variants = prepare(options)
    if options.profile and not options.profile.parent.is_dir():
        raise UserError(f"--profile {options.profile}: there is no such folder")
    rates = common.ceilings(device)
    results = measure(options, variants, device, options.forward_only)
    add_floors(results, rates, device, options.forward_only)
    tables = [step_table(results, device, options.forward_only)]
    if options.forward_only:
        tables.append(spread_table(results))
    header = common.with_ceilings(options, device, rates)
    common.report(options, header, tables, ceilings=rates, measurements=[_record(m) for m in results])
    if options.plot:
        common.draw(
            step_panels(results, options), f"A {KINDS[options.forward_only]}, {header['machine']}", options.plot
        )
    if options.profile:
        profile(options, variants, device)
    return 0


def run_memory(options: argparse.Namespace) -> int:
    device, variants = prepare(options)
    rates = common.ceilings(device)
    tables, panels, records = [], [], []
    for forward_only, kind in KINDS.items():
        chosen = without_extras(variants) if forward_only else variants
        results = measure(options, chosen, device, forward_only)
        slopes = {line: slope(found) for line, found in by_line(results).items()}
        tables.append(memory_table(results, slopes, f"peak GiB of a {kind} ({device})"))
        panels.append(curves(results, kind, "megapixels", lambda m: m.pixels / 1e6, memory_only=True))
        for m in results:
            growth = slopes[m.model, m.variant]
            records.append({"kind": kind, **_record(m), "bytes_a_pixel": growth})
    header = common.with_ceilings(options, device, rates)
    common.report(options, header, tables, ceilings=rates, measurements=records)
    if options.plot:
        common.draw(panels, f"Peak memory, {header['machine']}", options.plot)
    return 0


def prepare(options: argparse.Namespace) -> tuple[str, list[Variant]]:
    """The device and the variants that are asked for; the process set up as training does it."""
    device = common.choose_device(options)
    common.check_models("--models", options.models)
    for size in options.sizes:
        if size % STRIDE:
            raise UserError(f"--sizes {size}: must be a multiple of {STRIDE}")
    mamba = [name for name in options.models if has_mamba(name)]
    names = options.variants or [*([] if mamba else ["plain"]), *PRECISIONS]
    variants = [check_variant(name, device, getattr(options, "forward_only", False)) for name in dict.fromkeys(names)]
    if mamba and "plain" in names:
        raise UserError(f"--variants plain: has no Mamba layers, and {mamba[0]} has; leave one of them out")
    if options.plot:
        common.import_matplotlib()
    set_deterministic(seed=0)  # the settings of torch that a training runs under
    if options.keep_freed_memory:
        keep_freed_memory()
    return device, variants


def check_variant(name: str, device: str, forward_only: bool) -> Variant:
    """The variant of that name, if there is one and it can be had here."""
    variant, parts = Variant(name), name.split("+")
    known = set(parts) <= {*PRECISIONS, *EXTRAS, LOOP} and len(variant.parts) == len(parts)
    if not variant.is_plain and not (known and len(variant.parts & set(PRECISIONS)) == 1):
        raise UserError(
            f"--variants {name}: no such variant; there are 'plain', and {' or '.join(PRECISIONS)} with any of "
            f"{', '.join(EXTRAS)}, {LOOP}, such as bf16+compile+checkpoint"
        )
    if "graphs" in parts and device == "cpu":
        raise UserError(f"--variants {name}: CUDA graphs need a GPU")
    if forward_only and variant.parts & set(EXTRAS):
        raise UserError(f"--variants {name}: {', '.join(EXTRAS)} change the training step, not --forward_only")
    return variant


def without_extras(variants: list[Variant]) -> list[Variant]:
    """As they predict, each once."""
    return [Variant(name) for name in dict.fromkeys(v.name if v.is_plain else v.precision for v in variants)]


def has_mamba(name: str) -> bool:
    with torch.device("meta"):
        return any(isinstance(module, Mamba) for module in create_model(name).modules())


# What is measured ------------------------------------------------------------------------------------------


class PlainModel(nn.Module):
    """What DSRNetModel does, with the network of tests/plain.py."""

    def __init__(self, network: nn.Module, vgg: Vgg19, loss: nn.Module):
        super().__init__()
        self.network = network.to(memory_format=torch.contiguous_format)
        self.vgg = vgg
        self.loss = loss

    def forward(self, image: Tensor, target_t: Tensor, target_r: Tensor) -> dict[str, Tensor]:
        return self.loss(*self._separate(image), image, target_t, target_r)

    @torch.no_grad()
    def predict(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._separate(image)

    def _separate(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from tests.plain import plain_forward

        with torch.no_grad():
            features = [f.contiguous() for f in self.vgg(image)]
        return plain_forward(self.network, image, features)


def build_model(name: str, variant: Variant, vgg: Vgg19, device: str) -> nn.Module:
    """With random weights, on the device."""
    network = create_model(name)
    for scale in (p for p in network.parameters() if p.shape[0] == 1 and p.dim() == 4):
        nn.init.normal_(scale, std=0.1)  # at their initial 0 some gradients vanish
    loss = ReflectionLoss(vgg)
    if variant.is_plain:
        return PlainModel(network, vgg, loss).to(device)
    if "checkpoint" in variant.parts:
        network.checkpoint_activations()
    model = DSRNetModel(network, vgg, loss, bf16=variant.precision == "bf16").to(device)
    if variant.is_compiled:
        model.compile(fullgraph=True, dynamic=False, mode="reduce-overhead" if "graphs" in variant.parts else None)
    return model


def training(name: str, variant: Variant, vgg: Vgg19, device: str) -> Work:
    """A training step that keeps its weights and its optimiser's state, and nothing else, from call to call."""
    model = build_model(name, variant, vgg, device)
    settings = {} if variant.is_plain else {"fused": True}
    optimizer = torch.optim.AdamW(parameter_groups(model.network, 1e-2), lr=1e-6, **settings)

    def step(images: Images) -> None:
        try:
            sum(model(*images).values()).backward()
            nn.utils.clip_grad_norm_(model.network.parameters(), math.inf)
            optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)

    return with_scan(variant, step)


def prediction(name: str, variant: Variant, vgg: Vgg19, device: str) -> Work:
    """`predict` of the mixtures."""
    model = build_model(name, variant, vgg, device).eval()
    return with_scan(variant, lambda images: model.predict(images[0]))


def with_scan(variant: Variant, work: Work) -> Work:
    """With the scan as the variant has it."""

    def scanning(images: Images) -> None:
        set_backend("reference" if LOOP in variant.parts else None)
        try:
            work(images)
        finally:
            set_backend(None)

    return scanning


def random_images(batch: int, size: int, device: str) -> Images:
    return [torch.rand(batch, 3, size, size, device=device) for _ in range(3)]


def measure(options: argparse.Namespace, variants: list[Variant], device: str, forward_only: bool) -> list[Measurement]:
    """Every model in every variant at every size and batch, variants in turn; without floors."""
    results = []
    vgg = Vgg19("random").to(device)
    build = prediction if forward_only else training
    for model in options.models:
        works = {variant.name: build(model, variant, vgg, device) for variant in variants}
        for size, batch in itertools.product(options.sizes, options.batches):
            if any(variant.is_compiled for variant in variants):
                torch.compiler.reset()  # else torch refuses to compile a step for more than a few sizes
            blank = [Measurement(model, variant.name, size, batch) for variant in variants]
            results += compare(works, blank, options, device, forward_only, results)
    return results


def compare(
    works: dict[str, Work],
    results: list[Measurement],
    options: argparse.Namespace,
    device: str,
    forward_only: bool,
    earlier: list[Measurement],
) -> list[Measurement]:
    """All variants on the same images, in turn; fills in `results`, one for each."""
    first = results[0]
    images = random_images(first.batch, first.size, device)
    calls = {name: functools.partial(work, images) for name, work in works.items()}
    foreseen = {m.variant: cost for m in results if (cost := foresee(m, earlier))}
    title = f"{KINDS[forward_only]}, {first.place}"
    costs = common.in_turn(calls, device, options.repeats, options.max_seconds, title, foreseen)
    for m in results:
        cost = costs[m.variant]
        m.note = cost.note
        if cost.seconds:
            m.milliseconds, m.repeats, m.peak = cost.milliseconds, len(cost.seconds), cost.peak
            m.fastest, m.slowest = 1e3 * min(cost.seconds), 1e3 * max(cost.seconds)
            m.ratio = first.milliseconds / m.milliseconds if first.milliseconds else None
    return results


def foresee(wanted: Measurement, earlier: list[Measurement]) -> tuple[float, float] | None:
    """Seconds and bytes by a line through the same variant's earlier ones, through a single one and the origin."""
    same = [m for m in earlier if m.milliseconds and (m.model, m.variant) == (wanted.model, wanted.variant)]
    if not same:
        return None
    points = [(0, 0, 0)] if len({m.pixels for m in same}) == 1 else []
    points += [(m.pixels, m.milliseconds / 1e3, m.peak) for m in same]
    pixels, seconds, peaks = zip(*points, strict=True)
    return tuple(float(np.polyval(np.polyfit(pixels, values, 1), wanted.pixels)) for values in (seconds, peaks))


def add_floors(results: list[Measurement], rates: dict[str, float], device: str, forward_only: bool) -> None:
    """Fill in FLOPs, floor and share.

    Args:
        results: of `measure`.
        rates: FLOP/s of a matrix product by precision.
        device, forward_only: as they were measured.
    """
    vgg = Vgg19("random").to(device)
    counts = {}
    for m in (m for m in results if m.milliseconds):
        if (m.model, m.size) not in counts:
            counts[m.model, m.size] = count_flops(m.model, m.size, vgg, device, forward_only)
        if flops := counts[m.model, m.size]:
            m.flops = flops * m.batch
            m.floor = 1e3 * m.flops / rates[Variant(m.variant).precision]
            m.share = m.floor / m.milliseconds


def count_flops(model: str, size: int, vgg: Vgg19, device: str, forward_only: bool) -> int | None:
    """Floating-point operations of one image's step in fp32: those of products, convolutions and scans.

    None where even that doesn't fit into memory.
    """
    common.progress(f"{model},{size}: counting operations")
    build = prediction if forward_only else training
    formulas = FORMULAS | {torch.ops.aten.convolution_backward: _backward_flops}
    try:
        work, images = build(model, Variant("fp32"), vgg, device), random_images(1, size, device)
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            work(images)
    except torch.cuda.OutOfMemoryError:
        return None
    common.progress("")
    return counter.get_total_flops()


def _backward_flops(
    grad_shape, x_shape, w_shape, _bias, _stride, _padding, _dilation, transposed, _out, _groups, mask, **_
) -> int:
    """Of a convolution: for each gradient as many as forward. torch's own formula takes the groups of a depthwise
    one for a single group when it comes to the weights' gradient, and counts as many times too much as there are."""
    forward = 2 * math.prod(w_shape) * grad_shape[0] * math.prod((x_shape if transposed else grad_shape)[2:])
    return forward * sum(mask[:2])


def profile(options: argparse.Namespace, variants: list[Variant], device: str) -> None:
    """Write and print where the time goes of the last model's last variant at the last size and batch."""
    build = prediction if options.forward_only else training
    work = build(options.models[-1], variants[-1], Vgg19("random").to(device), device)
    images = random_images(options.batches[-1], options.sizes[-1], device)
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


# What is shown ---------------------------------------------------------------------------------------------


def _record(m: Measurement) -> dict[str, object]:
    """As JSON has it."""
    if m.milliseconds is None:
        return asdict(m)
    return asdict(m) | {"images_a_second": m.images_a_second, "nanoseconds_a_pixel": m.nanoseconds_a_pixel}


def step_table(results: list[Measurement], device: str, forward_only: bool) -> tuple[str, common.Rows]:
    """Title and rows."""
    first = results[0].variant
    columns = [
        "model,size,batch",
        "variant",
        "ms",
        "min..max",
        "images/s",
        f"x {first}",
        "peak GiB",
        "floor ms",
        "share",
    ]
    rows = [columns + ["ns/pixel"] * forward_only]
    for m in results:
        if m.milliseconds is None:
            rows.append([m.place, m.variant, m.note, *[""] * (len(rows[0]) - 3)])
            continue
        times = [f"{m.milliseconds:.1f}", f"{m.fastest:.1f}..{m.slowest:.1f}", f"{m.images_a_second:.2f}"]
        ratio = f"{m.ratio:.2f}" if m.ratio else ""
        floor = [f"{m.floor:.1f}", f"{m.share:.0%}"] if m.floor else ["", ""]
        row = [m.place, m.variant, *times, ratio, f"{m.peak / 2**30:.3f}", *floor]
        rows.append(row + [f"{m.nanoseconds_a_pixel:.0f}"] * forward_only)
    return f"{KINDS[forward_only]} ({device})", rows


def by_line(results: list[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """Those of every model and variant."""
    lines = {}
    for m in results:
        lines.setdefault((m.model, m.variant), []).append(m)
    return lines


def spread_table(results: list[Measurement]) -> tuple[str, common.Rows]:
    """How far the time a pixel varies over sizes and batches."""
    rows = [["model", "variant", "least", "most", "most/least"]]
    for (model, variant), found in by_line([m for m in results if m.milliseconds]).items():
        costs = [m.nanoseconds_a_pixel for m in found]
        rows.append([model, variant, f"{min(costs):.0f}", f"{max(costs):.0f}", f"{max(costs) / min(costs):.2f}"])
    return "nanoseconds a pixel", rows


def slope(results: list[Measurement]) -> float | None:
    """Bytes that every further pixel takes, by least squares; None for fewer than two sizes."""
    measured = [m for m in results if m.milliseconds]
    if len({m.pixels for m in measured}) < 2:
        return None
    return float(np.polyfit([m.pixels for m in measured], [m.peak for m in measured], 1)[0])


def memory_table(
    results: list[Measurement], slopes: dict[tuple[str, str], float | None], title: str
) -> tuple[str, common.Rows]:
    """Title and rows, a column for every size."""
    lines = by_line(results)
    sizes = list(dict.fromkeys(m.size for m in results))
    rows = [["model", "variant", *(f"{size} x {size}" for size in sizes), "GiB/megapixel"]]
    for line, found in lines.items():
        cells = [f"{m.peak / 2**30:.3f}" if m.milliseconds else m.note for m in found]
        rows.append([*line, *cells, f"{slopes[line] * 1e6 / 2**30:.2f}" if slopes[line] else ""])
    return title, rows


def step_panels(results: list[Measurement], options: argparse.Namespace) -> list[common.Panel]:
    """Over the area where sizes vary, over the batch where these do."""
    panels = []
    if len(options.sizes) > 1 or len(options.batches) == 1:
        batch = options.batches[0]
        found = [m for m in results if m.batch == batch]
        panels.append(curves(found, f"batch {batch}", "megapixels of an image", lambda m: m.size**2 / 1e6))
    if len(options.batches) > 1:
        size = options.sizes[0]
        found = [m for m in results if m.size == size]
        panels.append(curves(found, f"{size} x {size}", "images at once", lambda m: m.batch))
    return panels


def curves(
    results: list[Measurement], title: str, xlabel: str, x: Callable[[Measurement], float], memory_only: bool = False
) -> common.Panel:
    """A line for every model and variant: time and peak memory over `x`."""
    lines = {}
    for line, found in by_line([m for m in results if m.milliseconds]).items():
        found = sorted(found, key=x)
        ys = ([m.milliseconds for m in found], [m.peak / 2**30 for m in found])
        lines[" ".join(line)] = ([x(m) for m in found], *ys[memory_only:])
    return common.Panel(title, xlabel, ("milliseconds", "peak GiB")[memory_only:], lines)
