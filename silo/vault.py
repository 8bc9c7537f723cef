"""Private tensors, one file per experiment. Nothing here can reach the wire: no module that sends imports this one."""

from hashlib import sha256
from pathlib import Path

import safetensors.numpy

from fedrt.errors import StorageError
from fedrt.statefile import ensure_private_directory, remove_unfinished, storage_error, write_atomic
from fedrt.tensors import Tensors


class Vault:
    """A private directory; the current private tensors are those of the last accepted round."""

    def __init__(self, directory: Path) -> None:
        ensure_private_directory(directory)
        remove_unfinished(directory)
        self._directory = directory

    def load(self, experiment_id: str) -> Tensors:
        """The private tensors, empty before the first accepted round. Raises `StorageError` if they are damaged."""
        path = self._path(experiment_id)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise storage_error("read", path, error) from error
        try:
            return safetensors.numpy.load(data)
        except safetensors.SafetensorError as error:
            raise StorageError(f"private tensors '{path}' are damaged; restore them from a backup") from error

    def promote(self, experiment_id: str, tensors: Tensors) -> None:
        """Make these the current private tensors, durably. Doing it again changes nothing. Raises `StorageError`."""
        if tensors:
            write_atomic(self._path(experiment_id), safetensors.numpy.save(dict(tensors)))

    def _path(self, experiment_id: str) -> Path:
        return self._directory / f"{experiment_id[:63]}-{sha256(experiment_id.encode()).hexdigest()[:16]}.safetensors"
