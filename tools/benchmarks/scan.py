"""`scan`: the backends of the selective scan beside each other, and beside mambapy's and the sequential loop."""

import argparse
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dereflect.models.scan import available_backends, selective_scan
from dereflect.tools.benchmarks import common, machine, output
from dereflect.tools.benchmarks.common import Measurement
from dereflect.util.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASELINES = ("mambapy", "reference")
DIRECTIONS = ("forward", "forward + backward")
COLUMNS = {
    "ms": "{milliseconds:.3f}",
    "ns/pixel": "{nanoseconds_a_pixel:.1f}",
    "G updates/s": "{updates:.2f}",
    **{f"x {name}": f"{{x_{name}:.2f}}" for name in BASELINES},
    "peak memory/inputs": "{memory:.2f}",
    "share": "{share:.1%}",
}


def run_scan(options: argparse.Namespace) -> None:
    device = common.choose_device(options)
    if options.plot:
        output.import_matplotlib()
    competitors = find_competitors(device, options.backends)
    rate, rate_words = ceiling(device)
    found = []
    for batch, channels, length in options.shapes:
        dtype = DTYPES[options.precision]
        inputs = scan_inputs(batch, channels, length, options.states, dtype, options.gated, device)
        for direction in DIRECTIONS:
            found += compare(competitors, inputs, direction, options, device, rate, found)
        del inputs
    header = machine.setting(options, device) | {"rate": rate_words}
    parts = {direction: [m for m in found if m.what["direction"] == direction] for direction in DIRECTIONS}
    title = f"({device}, {options.states} states)"
    tables = [output.table(f"{direction} {title}", part, COLUMNS) for direction, part in parts.items()]
    output.report(options, header, tables, found)
    if options.plot:
        rows = [(direction, part, "length", lambda m: m.what["length"]) for direction, part in parts.items()]
        axes = {"milliseconds": "milliseconds", "peak memory over the inputs' size": "memory"}
        output.draw(rows, axes, f"Selective scan, {header['machine']}", options.plot)


def ceiling(device: str) -> tuple[float, str]:
    """The rate that shares refer to, as a number and in words: bytes a second of a copy on a GPU, operations a second
    of a matrix product on a CPU."""
    if device == "cuda":
        rate = machine.copy_rate(device)
        return rate, f"share is of {rate / 1e9:.0f} GB/s, measured with a device copy of 256 MiB"
    rate, side = machine.matrix_rate(device, torch.float32), machine.matrix_side(device)
    return rate, f"share is of {rate / 1e9:.0f} GFLOP/s, measured with a {side} x {side} matrix product"


def find_competitors(device: str, wanted: list[str] | None) -> dict[str, Callable[..., Tensor]]:
    """Functions with the arguments of `selective_scan`, the presumably fastest first."""
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
    """A scan that uses mambapy's parallel prefix sum, which keeps every state of every step."""

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
    """Random arguments of `selective_scan`, with step sizes as they are after initialisation."""
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
    """Measure all competitors at one shape, in turn."""
    u, A = inputs[0], inputs[2]
    (batch, channels, length), states = u.shape, A.shape[1]
    leaves = [t for t in inputs if isinstance(t, Tensor)]
    dy = torch.randn_like(u)

    def call(scan: Callable[..., Tensor]) -> None:
        if direction == "forward":
            with torch.no_grad():
                scan(*inputs)
        else:
            torch.autograd.grad(scan(*inputs), leaves, dy)

    shape = {"batch": batch, "channels": channels, "length": length}
    found = common.compare(
        [
            (Measurement({"direction": direction, "backend": name} | shape, u.numel()), functools.partial(call, scan))
            for name, scan in competitors.items()
        ],
        options, device, earlier, common.kernel_seconds,
    )  # fmt: skip
    for name in BASELINES:
        common.add_ratio(found, next((m for m in found if m.what["backend"] == name), None), f"x_{name}")
    updates = u.numel() * states
    work = bytes_moved(inputs, direction) if device == "cuda" else operations(updates, direction)
    for m in (m for m in found if not m.note):
        m.figures |= {
            "states": states,
            "nanoseconds_a_pixel": 1e6 * m.milliseconds / (batch * length),
            "updates": updates / m.milliseconds / 1e6,  # 1e9 a second
            "memory": m.peak / sum(t.nbytes for t in leaves),  # over the size of the inputs
            "share": work / m.milliseconds * 1e3 / rate,  # of the arithmetic peak (CPU) or of the copy rate (GPU)
        }
    return found


def operations(updates: int, direction: str) -> float:
    """Floating-point operations, an exponential counted as one: 7 an update forward, 19 backward."""
    return (7 if direction == "forward" else 7 + 19) * updates


def bytes_moved(inputs: list, direction: str) -> float:
    """Bytes that every kernel has to move: all inputs are read once, all outputs written once."""
    size = sum(t.nbytes for t in inputs if isinstance(t, Tensor))
    y = inputs[0].nbytes
    return size + y if direction == "forward" else size + y + (size + y + size)
