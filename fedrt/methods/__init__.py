"""The table of built-in methods, and third-party ones found through the entry points `fedrt.methods`."""

import difflib
import json
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from fedrt.errors import SpecError
from fedrt.method import Method, parse_hyperparameters
from fedrt.methods.coop import CoOp
from fedrt.methods.fedotp import FedOTP
from fedrt.methods.fedpgp import FedPGP
from fedrt.methods.fedprox import FedProx
from fedrt.methods.promptfl import PromptFL
from fedrt.methods.promptfolio import PromptFolio
from fedrt.methods.zeroshot import ZeroShot

BUILT_IN: dict[str, type[Method]] = {
    CoOp.name: CoOp,
    FedOTP.name: FedOTP,
    FedPGP.name: FedPGP,
    FedProx.name: FedProx,
    PromptFL.name: PromptFL,
    PromptFolio.name: PromptFolio,
    ZeroShot.name: ZeroShot,
}


@lru_cache(maxsize=1)
def _installed() -> tuple[EntryPoint, ...]:
    """Read once: what is installed while a daemon runs counts from its next start."""
    return tuple(entry_points(group="fedrt.methods"))


def method_names() -> list[str]:
    """The names of all installed methods."""
    return sorted({*BUILT_IN, *(point.name for point in _installed())})


def find_method(name: str) -> type[Method]:
    """The declaration of a method. Raises `SpecError` if it is not installed."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    for point in _installed():
        if point.name == name:
            try:
                loaded: type[Method] = point.load()
            except Exception as error:  # whatever a third-party package raises while it is imported
                raise SpecError(f"method {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
            return loaded
    close = difflib.get_close_matches(name, method_names(), 1)
    hint = f"did you mean {close[0]!r}?" if close else f"installed are {method_names()}"
    raise SpecError(f"method {name!r} is not installed; {hint}")


@lru_cache(maxsize=256)
def make_method(name: str, hyperparameters_json: str) -> Method:
    """The method as an experiment names it; equal names give the same frozen value. Raises `SpecError`."""
    return parse_hyperparameters(find_method(name), json.loads(hyperparameters_json))
