"""Which experiments a run of chosen ones makes for a fault."""

import random
from typing import Any, cast

from tests.chaos.experiments import numpy_specs
from tests.chaos.pool import Pool


def pool_of(*names: str) -> Pool:
    every = numpy_specs(("north", "south", "west"))
    return Pool(cast(Any, None), {name: every[name] for name in names}, random.Random(1))


def test_a_fault_that_wants_an_experiment_gets_one_that_this_run_has() -> None:
    assert pool_of("transport", "pair").among("pair", "transport") == ["pair", "transport"]
    assert pool_of("transport", "large").among("pair", "transport") == ["transport"]
    assert pool_of("large", "median").among("transport") == ["large", "median"]
