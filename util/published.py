"""The published benchmark: its sets, their sizes, and the figures that others have measured on them."""

from collections.abc import Iterable
from typing import NamedTuple


class PublishedSet(NamedTuple):
    """A published test set.

    Attributes:
        title: its name in tables.
        images: how many pairs it has.
        averaged: whether the published average, weighted by the numbers of images, includes it.
    """

    title: str
    images: int
    averaged: bool = True


TRAIN_COUNTS = {"photographs": 15287, "real": 89, "nature": 200}
"""Images or pairs of the published training sets."""

TEST_SETS = {
    "real20_420": PublishedSet("Real20", 20),
    "SolidObjectDataset": PublishedSet("Objects", 200),
    "PostcardDataset": PublishedSet("Postcard", 199),
    "WildSceneDataset": PublishedSet("Wild", 55),
    "Nature": PublishedSet("Nature", 20, averaged=False),
}
"""The published test sets by the name of their folder."""

AVERAGED_SETS = tuple(name for name, found in TEST_SETS.items() if found.averaged)
"""The sets of the published average."""

AVERAGE, AVERAGE_PUBLISHED = "average", "average_published"
"""The mean over all test sets, and the mean over the sets of the published average."""

REAL20 = [str(number) for number in (3, 4, 9, 12, 15, 22, 23, 25, 29, 39, 46, 47, 58, 86, 87, 89, 93, 103, 107, 110)]
"""The names of the images in Real20."""

FIGURES = {
    "ERRNet": ((22.89, 0.803), (24.87, 0.896), (22.04, 0.876), (24.25, 0.853), (23.53, 0.879)),
    "IBCLN": ((21.86, 0.762), (24.87, 0.893), (23.39, 0.875), (24.71, 0.886), (24.10, 0.879)),
    "YTMT": ((23.26, 0.806), (24.87, 0.896), (22.91, 0.884), (25.48, 0.890), (24.05, 0.886)),
    "RAGNet": ((22.95, 0.793), (26.15, 0.903), (23.67, 0.879), (25.53, 0.880), (24.90, 0.886)),
    "DSRNet": ((24.23, 0.820), (26.28, 0.914), (24.56, 0.908), (25.68, 0.896), (25.40, 0.905)),
    "M2DSRNet": ((23.24, 0.801), (26.83, 0.920), (24.00, 0.904), (26.23, 0.907), (25.42, 0.907)),
    "MXDSRNet": ((23.01, 0.793), (26.33, 0.917), (24.06, 0.901), (24.96, 0.900), (25.07, 0.903)),
    "DSRNet-W": ((23.58, 0.802), (26.76, 0.919), (25.01, 0.910), (26.36, 0.908), (25.84, 0.909)),
    "MDSRNet-W": ((23.65, 0.814), (25.93, 0.914), (24.89, 0.914), (27.14, 0.914), (25.54, 0.910)),
    "RDNet": ((25.58, 0.846), (26.78, 0.921), (26.33, 0.922), (27.70, 0.915), (26.65, 0.917)),
    "WindowSeat": ((26.60, 0.864), (28.85, 0.938), (28.70, 0.933), (29.44, 0.936), (28.76, None)),
}
"""PSNR and SSIM as their authors published them, of the averaged sets in this order, then of their average."""


def averaged_sets(names: Iterable[str]) -> dict[str, list[str]]:
    """The test sets that each average is over; AVERAGE_PUBLISHED is there only if all of its sets are."""
    names = list(names)
    groups = {AVERAGE: names} if names else {}
    if set(AVERAGED_SETS) <= set(names):
        groups[AVERAGE_PUBLISHED] = [name for name in names if name in AVERAGED_SETS]
    return groups
