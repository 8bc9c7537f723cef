"""The error tree of fedrt; the class says whose fault it is and which exit code a daemon ends with.

FedrtError                    anything an operator may read; the message names the thing and the next step
├── ConfigurationError        the operator's files are wrong (exit 78)
│   └── SpecError             an experiment's specification is wrong
├── IdentityError             keys or certificates are missing, wrong, expired or refused (exit 77)
├── PayloadError              bytes that arrived do not match what was announced
├── TensorError               tensors do not match what the method declared
├── ProtocolError             never raised itself
│   ├── LocalProtocolError    we tried to send an illegal frame: a bug of ours
│   └── RemoteProtocolError   the peer sent an illegal frame
├── StorageError              the disk refuses; later it may not
│   └── DamageError           what the disk holds is damaged or missing: a backup has to help
├── SilenceError              the peer has not been heard for too long (fedrt.transport)
├── StreamEndedError          the stream ended while we were writing (fedrt.transport)
├── UnreachableError          an operator's command cannot reach the coordinator (fedrt.admin_client, exit 75)
├── RequestError              the coordinator turned an operator's request down (fedrt.admin_client)
└── WorkError                 local work failed; `reason` is what the coordinator is told

Programming errors are ordinary `ValueError`, `TypeError` and `AssertionError`, and are not caught.
"""

import enum


class ExitCode(enum.IntEnum):
    """How a daemon or command ends; the last three follow sysexits(3)."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    TEMPORARY = 75
    IDENTITY_REFUSED = 77
    CONFIGURATION = 78


class FedrtError(Exception):
    """Something went wrong that an operator may read about."""

    exit_code: ExitCode = ExitCode.INTERNAL


class ConfigurationError(FedrtError):
    """An operator's file is wrong."""

    exit_code = ExitCode.CONFIGURATION


class SpecError(ConfigurationError):
    """An experiment's specification is wrong."""


class IdentityError(FedrtError):
    """A key or certificate is missing, wrong, expired or refused."""

    exit_code = ExitCode.IDENTITY_REFUSED


class PayloadError(FedrtError):
    """Bytes that arrived do not match their manifest."""


class TensorError(FedrtError):
    """Tensors do not match what the method declared."""


class ProtocolError(FedrtError):
    """A frame is illegal. Only the two children are raised."""

    def __init__(self, message: str) -> None:
        if type(self) is ProtocolError:
            raise TypeError("raise LocalProtocolError or RemoteProtocolError")
        super().__init__(message)


class LocalProtocolError(ProtocolError):
    """We tried to send a frame that is illegal now: a bug of ours."""


class RemoteProtocolError(ProtocolError):
    """The peer sent a frame that is illegal now."""


class StorageError(FedrtError):
    """The disk refuses."""

    exit_code = ExitCode.TEMPORARY


class DamageError(StorageError):
    """What the disk holds is damaged or missing."""


class FailureReason(enum.Enum):
    """Why a task failed, as the coordinator is told."""

    PAYLOAD_CORRUPT = "payload_corrupt"
    TIME_LIMIT = "time_limit"
    CANCELLED = "cancelled"
    DATA_UNAVAILABLE = "data_unavailable"
    NOT_FINITE = "not_finite"
    OUT_OF_MEMORY = "out_of_memory"
    INTERNAL = "internal"


class WorkError(FedrtError):
    """Local work failed.

    The message reaches the coordinator: it never contains file paths, data values or stack traces. A daemon that cannot
    even start its worker ends with it: what kills a worker, such as want of memory, may have passed at the next start.
    """

    exit_code = ExitCode.TEMPORARY

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
