"""`scan`: the backends of the selective scan beside each other, and beside mambapy's and the sequential loop."""

import argparse
import functools
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.scan import available_backends, selective_scan
from tools.benchmarks import common
from util.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (1024, 4096, 16384, 50176)  # 50,176 pixels are 224 x 224
BASELINES = ("mambapy", "reference")
DIRECTIONS = ("forward", "forward + backward")


@dataclass
class Measurement:
    """One backend at one shape; `direction` is "forward" or "forward + backward"."""

    backend: str
    direction: str
    batch: int
    channels: int
    length: int
    states: int
    milliseconds: float | None  # the median; None where it was left out
    repeats: int = 0
    memory: float | None = None  # the peak beyond what was there before, over the size of the inputs
    share: float | None = None  # of the arithmetic peak (CPU) or of the copy rate (GPU)
    note: str = ""

    @property
    def shape(self) -> str:
        return f"{self.batch},{self.channels},{self.length}"

    @property
    def nanoseconds_a_pixel(self) -> float:
        return 1e6 * self.milliseconds / (self.batch * self.length)

    @property
    def updates(self) -> float:
        """State updates a second, in 1e9."""
        return self.batch * self.channels * self.length * self.states / self.milliseconds / 1e6


def add_scan(commands) -> None:
    parser = commands.add_parser(
        "scan",
        help="the backends of the selective scan",
        description="Times every backend that works on the device, and mambapy's parallel scan where it is "
        "installed. 'reference' is the sequential loop.",
    )
    parser.set_defaults(run=run_scan)
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="B,D,L",
                        help="batch, channels, length (default: 2,128 and 1024, 4096, 16384, 50176)")  # fmt: skip
    parser.add_argument("--states", type=int, default=16, metavar="N", help="states of every channel")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of u, delta, B, C and z")
    parser.add_argument("--gated", action="store_true",
                        help="with z, delta_bias and softplus, as a Mamba layer calls it")  # fmt: skip
    common.add_device(parser)
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="only these (default: all that work)")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="at most so many of each")
    parser.add_argument("--max_seconds", type=float, default=30, metavar="S",
                        help="for one backend at one shape; what would need more even once is left out")  # fmt: skip
    common.add_output(parser, plot="time and memory over the length")


def shape(text: str) -> tuple[int, int, int]:
    """argparse type: `2,128,4096`."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not batch,channels,length such as 2,128,4096")
    return tuple(map(int, text.split(",")))


def run_scan(options: argparse.Namespace) -> int:
    device = common.choose_device(options)
    if options.plot:
        common.import_matplotlib()
    competitors = find_competitors(device, options.backends)
    shapes = options.shapes or [(2, 128, length) for length in LENGTHS]
    rate, rate_words = ceiling(device)
    measurements = []
    for batch, channels, length in shapes:
        inputs = scan_inputs(batch, channels, length, options.states, DTYPES[options.dtype], options.gated, device)
        for direction in DIRECTIONS:
            measurements += compare(competitors, inputs, direction, options, device, rate, measurements)
        del inputs
    header = common.setting(options, device) | {"rate": rate_words}
    tables = [scan_table(measurements, direction, device) for direction in DIRECTIONS]
    common.report(options, header, tables, measurements=[asdict(m) for m in measurements])
    if options.plot:
        panels = [panel(measurements, direction) for direction in DIRECTIONS]
        common.draw(panels, f"Selective scan, {header['machine']}", options.plot)
    return 0


def ceiling(device: str) -> tuple[float, str]:
    """What the share is of: bytes a second of a copy on a GPU, operations a second on a CPU; and in words."""
    if device == "cuda":
        rate = common.copy_rate(device)
        return rate, f"share is of {rate / 1e9:.0f} GB/s, measured with a device copy of 256 MiB"
    rate, side = common.matrix_rate(device, torch.float32), common.matrix_side(device)
    return rate, f"share is of {rate / 1e9:.0f} GFLOP/s, measured with a {side} x {side} matrix product"


def find_competitors(device: str, wanted: list[str] | None) -> dict[str, Callable[..., Tensor]]:
    """Functions of the arguments of `selective_scan`, fastest expected first."""
    reasons = available_backends(device)
    try:
        import mambapy.pscan

        found = {"mambapy": mambapy_scan(mambapy.pscan.pscan)}
    except ImportError as error:
        found, reasons["mambapy"] = {}, str(error)
    working = [name for name in available_backends(device) if reasons[name] is None]
    found |= {name: lambda *t, backend=name: selective_scan(*t, backend=backend) for name in working}
    found = {name: found[name] for name in (*working[:-1], "mambapy", "reference") if name in found}
    for name in wanted or ():
        if name not in found:
            raise UserError(f"--backends {name}: {reasons.get(name, 'no such backend')}")
    return {name: scan for name, scan in found.items() if not wanted or name in wanted}


def mambapy_scan(pscan: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The scan around mambapy's parallel prefix sum, which keeps every state of every step."""

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
        if delta_bias is not None:
            delta = delta + delta_bias[:, None]
        if delta_softplus:
            delta = F.softplus(delta)
        u, delta, B, C = u.mT, delta.mT, B.mT, C.mT  # (batch, length, ...)
        decay = torch.exp(delta[..., None] * A)  # (batch, length, d, n)
        h = pscan(decay, (delta * u)[..., None] * B[:, :, None])
        y = (torch.einsum("bldn,bln->bld", h, C.to(h.dtype)) + D * u).mT
        return y if z is None else y * F.silu(z)

    return scan


def scan_inputs(
    batch: int, channels: int, length: int, states: int, dtype: torch.dtype, gated: bool, device: str
) -> list[Tensor | bool | None]:
    """Arguments of `selective_scan` at random, with step sizes as they are after initialisation."""
    generator = torch.Generator().manual_seed(0)

    def random(*size, dtype=dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

    u, delta, z = (random(batch, channels, length) for _ in range(3))
    with torch.no_grad():
        delta.sub_(4) if gated else delta.sub_(4).exp_()
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    B, C = (random(batch, states, length) for _ in range(2))
    D, bias = (random(channels, dtype=torch.float32) for _ in range(2))
    return [u, delta, A.requires_grad_(), B, C, D, z if gated else None, bias if gated else None, gated]


def compare(
    competitors: dict[str, Callable[..., Tensor]],
    inputs: list,
    direction: str,
    options: argparse.Namespace,
    device: str,
    rate: float,
    earlier: list[Measurement],
) -> list[Measurement]:
    """All competitors at one shape, in turn."""
    u, A = inputs[0], inputs[2]
    (batch, channels, length), states = u.shape, A.shape[1]
    leaves = [t for t in inputs if isinstance(t, Tensor)]
    dy = torch.randn_like(u)
    size = sum(t.nbytes for t in leaves)

    def call(scan: Callable[..., Tensor]) -> None:
        if direction == "forward":
            with torch.no_grad():
                scan(*inputs)
        else:
            torch.autograd.grad(scan(*inputs), leaves, dy)

    results = [Measurement(name, direction, batch, channels, length, states, None) for name in competitors]
    calls = {name: functools.partial(call, scan) for name, scan in competitors.items()}
    expected = {result.backend: extrapolate(result, earlier) for result in results}
    foreseen = {name: (m.milliseconds / 1e3, m.memory * size) for name, m in expected.items() if m}
    title = f"{direction}, {batch},{channels},{length}"
    costs = common.in_turn(calls, device, options.repeats, options.max_seconds, title, foreseen, common.kernel_seconds)
    work = bytes_moved(inputs, direction) if device == "cuda" else operations(results[0])
    for result in results:
        cost = costs[result.backend]
        result.note = cost.note
        if cost.seconds:
            result.milliseconds, result.repeats = cost.milliseconds, len(cost.seconds)
            result.memory = cost.peak / size
            result.share = work / result.milliseconds * 1e3 / rate
    return results


def extrapolate(wanted: Measurement, earlier: list[Measurement]) -> Measurement | None:
    """The same backend at the last shape, with the time and memory it would have at this one."""
    same = [m for m in earlier if m.milliseconds and (m.backend, m.direction) == (wanted.backend, wanted.direction)]
    if not same:
        return None
    factor = wanted.batch * wanted.channels * wanted.length / (same[-1].batch * same[-1].channels * same[-1].length)
    return Measurement(**(asdict(same[-1]) | {"milliseconds": same[-1].milliseconds * factor}))


def operations(result: Measurement) -> float:
    """Floating-point operations, an exponential counted as one: 7 an update forward, 19 backward."""
    per_update = 7 if result.direction == "forward" else 7 + 19
    return per_update * result.batch * result.channels * result.length * result.states


def bytes_moved(inputs: list, direction: str) -> float:
    """What no kernel can avoid: everything read once and written once."""
    size = sum(t.nbytes for t in inputs if isinstance(t, Tensor))
    y = inputs[0].nbytes
    return size + y if direction == "forward" else size + y + (size + y + size)


def scan_table(measurements: list[Measurement], direction: str, device: str) -> tuple[str, list[list[str]]]:
    """Title and rows, the first with the columns' names."""
    rows = [["batch,channels,length", "backend", "ms", "ns/pixel", "G updates/s"]]
    rows[0] += [f"x {name}" for name in BASELINES] + ["peak memory/inputs", "share"]
    for m in measurements:
        if m.direction != direction:
            continue
        if m.milliseconds is None:
            rows.append([m.shape, m.backend, m.note, *[""] * (len(rows[0]) - 3)])
            continue
        ratios = []
        for name in BASELINES:
            base = next(
                o for o in [*measurements, None]
                if o is None or (o.backend, o.direction, o.shape) == (name, direction, m.shape)
            )  # fmt: skip
            ratios.append(f"{base.milliseconds / m.milliseconds:.2f}" if base and base.milliseconds else "")
        speed = [f"{m.milliseconds:.3f}", f"{m.nanoseconds_a_pixel:.1f}", f"{m.updates:.2f}"]
        rows.append([m.shape, m.backend, *speed, *ratios, f"{m.memory:.2f}", f"{100 * m.share:.1f}%"])
    return f"{direction} ({device}, {measurements[0].states} states)", rows


def panel(measurements: list[Measurement], direction: str) -> common.Panel:
    """Time and memory over the length, a line for every backend."""
    measured = [m for m in measurements if m.direction == direction and m.milliseconds]
    lines = {}
    for name in dict.fromkeys(m.backend for m in measured):
        line = sorted((m for m in measured if m.backend == name), key=lambda m: m.length)
        lines[name] = ([m.length for m in line], [m.milliseconds for m in line], [m.memory for m in line])
    return common.Panel(direction, "length", ("milliseconds", "peak memory over the inputs' size"), lines)
