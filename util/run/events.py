"""A run's file of TensorBoard's events."""

import socket
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from dereflect.util import disk
from dereflect.util.run.folder import EVENTS
from dereflect.util.run.reader import Run, event_lengths


class Events:
    """TensorBoard's file of events, written at once and in this thread.

    torch's SummaryWriter writes in a thread of its own, which reports a full disk minutes later or, at the end, never.

    Args:
        folder: of the run.
        step: steps of the optimiser that are done; TensorBoard ignores points of later steps in earlier files.
    """

    def __init__(self, folder: Path, step: int):
        self._folder, self._step = folder, step
        # TensorBoard reads the files by name; the clock may have been set back since the last one.
        numbers = [int(part) for path in folder.glob(f"{EVENTS}*") if (part := path.name.split(".")[3]).isdigit()]
        number = max([int(time.time()), *(number + 1 for number in numbers)])
        self.path = folder / f"{EVENTS}{number:010}.{socket.gethostname()}"
        with disk.writing(self.path):
            self._file = self.path.open("wb")
        self._writer = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, content: Summary, step: int) -> None:
        self._write(Event(step=step, summary=content))

    def forget(self, step: int, tags: Collection[str]) -> None:
        """Have TensorBoard ignore the points of a step with these tags that an earlier start has left.

        It can only be told to ignore all points from a step on; so the other points of the step are written once more.
        Points of steps after the one of this start are ignored already.
        """
        points = _points(self._folder, step) if step == self._step else {}
        if not points.keys().isdisjoint(tags):
            self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
            self.add(Summary(value=[point for tag, point in points.items() if tag not in tags]), step)

    def close(self) -> None:
        with disk.writing(self.path):
            self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with disk.writing(self.path):
            self._writer.write(event.SerializeToString())
            self._file.flush()


def _points(folder: Path, step: int) -> dict[str, Summary.Value]:
    """The points of a step in a run's files of events by their tags, the latest of each."""
    points = {}
    for path in Run(folder).events:
        with path.open("rb") as file, suppress(DecodeError):  # TensorBoard, too, reads a damaged file up to there
            for length in event_lengths(file):
                event = Event.FromString(file.read(length))
                if event.step == step:
                    points |= {value.tag: value for value in event.summary.value}
    return points
