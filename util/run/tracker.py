"""A tracker beside the record: trackio or wandb, which are called alike."""

import importlib
from argparse import Namespace
from collections.abc import Mapping

from dereflect.options import as_text
from dereflect.options.parser import FROM, HOW, WHAT
from dereflect.util.errors import UserError


class Tracker:
    """Sends options and figures to the tracker that --tracker names; without one, nothing.

    Each start of a run is a run of the tracker.

    Raises:
        UserError: the tracker's package is not installed.
    """

    def __init__(self, options: Namespace):
        self._run = None
        name = getattr(options, "tracker", None)
        if name:
            try:
                package = importlib.import_module(name)
            except ImportError as error:
                raise UserError(f"--tracker {name}: {error}; pip install {name}") from error
            config = as_text(options, [WHAT, FROM, HOW])
            self._package = package
            self._run = package.init(project="reflection-removal", name=options.name, config=config)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves."""
        if self._run is not None:
            self._package.log(dict(values), step=step)

    def finish(self) -> None:
        """End the tracker's run."""
        if self._run is not None:
            self._package.finish()
