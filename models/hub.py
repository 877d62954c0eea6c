"""Weights at Hugging Face, .safetensors files alone: nothing is ever unpickled. The package is imported on demand."""

import re
import tempfile
from pathlib import Path
from types import ModuleType

from torch import Tensor

from dereflect.util.errors import UserError
from dereflect.util.run.checkpoint import save_weights
from dereflect.util.run.contents import check_file

FILE = "model.safetensors"

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OTHER_FILES = {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}


def is_id(text: str) -> bool:
    """Whether a text is the id of a repository, "someone/some-network", and not the path of a file."""
    return bool(_ID.fullmatch(text)) and Path(text).suffix not in _OTHER_FILES


def download(repository: str) -> Path:
    """The file with a repository's weights, in Hugging Face's cache.

    Raises:
        UserError: the package isn't installed, there is no such repository or no such file in it, or the file is of
            another format.
    """
    hub = _package(repository)
    try:
        path = Path(hub.hf_hub_download(repository, FILE))
    except Exception as error:  # the package raises its own, requests' and the system's
        raise UserError(f"{repository}: no such file here, and no {FILE} at Hugging Face: {_line(error)}") from error
    if not check_file(path):
        raise UserError(f"{repository}: its {FILE} is of another format, which isn't read from there")
    return path


def upload(repository: str, state: dict[str, Tensor], about: dict, private: bool) -> str:
    """Write weights to a repository, which is made if there is none; the address of the commit.

    Raises:
        UserError: the package isn't installed, or Hugging Face refuses.
    """
    hub = _package(repository)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        save_weights({name: value.cpu() for name, value in state.items()}, about, file)
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            return str(hub.upload_file(path_or_fileobj=file, path_in_repo=FILE, repo_id=repository))
        except Exception as error:
            raise UserError(f"{repository}: can't be written at Hugging Face: {_line(error)}") from error


def _package(repository: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{repository}: no such file here, and Hugging Face needs a package: pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
