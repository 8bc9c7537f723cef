"""Where a silo dials, as whom, and what it asks of gRPC when it does."""

from dataclasses import dataclass

from fedrt.statefile import storage_error
from fedrt.tls import IdentityFiles

ANSWER_LIMIT = 10.0  # seconds from dialling to the coordinator's first frame
DIAL_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # an attempt of an earlier channel, or its waiting time, is not taken over
    # closing a channel does not end its attempt to connect, which takes up to 20 seconds by default
    ("grpc.min_reconnect_backoff_ms", round(950 * ANSWER_LIMIT)),
)


@dataclass(frozen=True)
class Dialling:
    """Where the coordinator is, who we are, and how long to wait between attempts (seconds)."""

    address: str
    server_name: str | None
    files: IdentityFiles
    federation: str | None
    initial_delay: float
    max_delay: float


def unreadable(files: IdentityFiles) -> str | None:
    """Why one of the files cannot be read now, if so. It could be once: a mount that is gone may come back."""
    for path in (files.key_path, files.certificate_path, files.trust_path):
        try:
            path.open("rb").close()
        except OSError as error:
            return str(storage_error("read", path, error))
    return None
