"""Records: means over silos, and when there is something to write."""

import numpy as np
import pytest

from coordinator.records import Changes, Contribution, SiloChanged, SiloRecord, TensorsRef, mean_metrics
from fedrt.payload import headers_of
from fedrt.task import TaskKind


def contribution(silo, example_count, **metrics):
    return Contribution(silo, example_count, metrics, 1.0, 0)


def test_means_are_weighted_by_examples():
    assert mean_metrics((contribution("a", 1, loss=4.0), contribution("b", 3, loss=8.0))) == {"loss": 7.0}


def test_a_metric_is_averaged_over_the_silos_that_report_it():
    means = mean_metrics((contribution("a", 1, loss=4.0), contribution("b", 3, loss=8.0, novel=0.5)))
    assert means == {"loss": 7.0, "novel": 0.5}
    assert list(means) == ["loss", "novel"]


def test_in_an_evaluation_every_silo_counts_the_same():
    silos = (contribution("a", 10, novel_accuracy=0.9), contribution("b", 990, novel_accuracy=0.5))
    assert mean_metrics(silos, TaskKind.EVALUATE)["novel_accuracy"] == pytest.approx(0.7)
    assert mean_metrics(silos, TaskKind.TRAIN)["novel_accuracy"] == pytest.approx(0.504)


def test_silos_without_examples_do_not_count():
    silos = (contribution("a", 0, loss=100.0, only_a=1.0), contribution("b", 2, loss=1.0))
    assert mean_metrics(silos) == {"loss": 1.0}
    assert mean_metrics(()) == {}


@pytest.mark.parametrize("count", [1, 7, 10**18])
def test_the_mean_of_equal_values_is_that_value(count):
    assert mean_metrics((contribution("a", count, accuracy=0.75), contribution("b", count, accuracy=0.75))) == {
        "accuracy": 0.75
    }


def test_a_reference_to_tensors_knows_their_size():
    ref = TensorsRef(headers_of({"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float16)}), "ab" * 32)
    assert ref.byte_count == 24 + 10


def test_changes_are_worth_a_transaction_only_if_there_are_any():
    assert not Changes()
    assert Changes(events=[SiloChanged(SiloRecord("a", "1", "cpu", (), 0.0, connected=True))])
    assert Changes(blobs={"ab": memoryview(b"x")})
