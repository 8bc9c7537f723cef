"""The table of built-in local halves, and third-party ones found through the entry points `silo.methods`."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from fedrt.errors import SpecError
from fedrt.methods.coop import CoOp
from fedrt.methods.fedotp import FedOTP
from fedrt.methods.fedpgp import FedPGP
from fedrt.methods.fedprox import FedProx
from fedrt.methods.promptfl import PromptFL
from fedrt.methods.promptfolio import PromptFolio
from fedrt.methods.zeroshot import ZeroShot
from silo.method import LocalMethod, TextTower
from silo.methods import coop, fedotp, fedpgp, fedprox, promptfl, promptfolio, zeroshot

Build = Callable[[Any, TextTower], LocalMethod]  # (the declaration with its hyper-parameters, text tower)

BUILT_IN: dict[str, Build] = {
    CoOp.name: coop.build,
    FedOTP.name: fedotp.build,
    FedPGP.name: fedpgp.build,
    FedProx.name: fedprox.build,
    PromptFL.name: promptfl.build,
    PromptFolio.name: promptfolio.build,
    ZeroShot.name: zeroshot.build,
}


def local_method_names() -> list[str]:
    """The names of all methods whose local half is installed."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group="silo.methods"))})


def find_local_method(name: str) -> Build:
    """The function that builds the local half of a method. Raises `SpecError` if it is not installed."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    for point in entry_points(group="silo.methods"):
        if point.name == name:
            try:
                build: Build = point.load()
            except Exception as error:  # whatever a third-party package raises while it is imported
                raise SpecError(
                    f"the local half of method {name!r} cannot be loaded: {type(error).__name__}: {error}"
                ) from error
            return build
    raise SpecError(
        f"method {name!r} has no local half on this silo; install the package that brings it "
        f"(entry point 'silo.methods'), installed are {local_method_names()}"
    )
