"""The cost model and the reduction's simulation: they say what they must in cases that are known."""

import numpy as np
import pytest

from benchmarks import reduction, scaling
from benchmarks.reduction import Merge

MERGE = Merge(num_bytes=1000, seconds=0.5, bytes_per_second=2000.0)  # 1 s a result


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("fan_in", [2, 7, 100])
def test_a_tree_of_any_width_gives_the_bits_of_the_flat_sum(second, fan_in):
    parts = reduction.partial_results(12, second, 23)
    total = reduction.merged(parts, 12, second)
    as_tree, levels = reduction.tree_merged(parts[::-1], 12, second, fan_in)
    assert reduction.same_bits(total, as_tree)
    assert levels[-1] == 1
    assert all(
        after == -(-before // fan_in) for before, after in zip([23, *levels], levels[:-1], strict=False)
    )


def test_tasks_take_the_time_that_their_work_takes():
    ends = reduction.task_ends(4000, 100, 2.0)
    work = 4000 * 2.0 * np.exp(0.2**2 / 2) * 1.02  # mean of the lognormal, and of those that take three times
    assert ends[-1] == pytest.approx(work / 100, rel=0.1)
    assert ends[-1] >= work / 100 * 0.95
    assert len(reduction.task_ends(3, 100, 2.0)) == 3


def test_a_driver_that_is_fast_enough_ends_with_the_tasks():
    slow_tasks = np.arange(1, 101) * 10.0
    found = reduction.flat(slow_tasks, MERGE)
    assert found["total stands, s later"] == 1.0
    assert found["most bytes waiting"] == 1000


def test_a_driver_that_is_too_slow_is_the_bottleneck_and_a_tree_relieves_it():
    at_once = np.full(1000, 5.0)
    flat = reduction.flat(at_once, MERGE)
    assert flat["total stands, s later"] == 1000.0
    assert flat["most bytes waiting"] == 1000 * 1000
    found = reduction.tree(at_once, MERGE, 10)
    # Three levels, of ten merges each on a worker of its own, the last one on the driver.
    assert found["total stands, s later"] == 30.0
    assert found["driver busy, s"] == 10.0


def test_the_fit_of_the_model_finds_its_constants():
    points = [
        {"rows": rows, "workers": workers, "seconds": 3.0 + rows * 1e-5 / min(workers, 2)}
        for rows in (1e5, 1e6, 4e6)
        for workers in (1, 2, 3)
    ]
    assert scaling.fitted(points, cores=2) == pytest.approx((3.0, 1e-5))


CONSTANTS = scaling.Constants(
    start_up=3.0,
    row=1e-5,
    mapped_start_up=3.0,
    mapped_row=2e-5,
    task=0.01,
    merge=Merge(num_bytes=328_064, seconds=2e-4, bytes_per_second=1.5e9),
    second_merge=Merge(num_bytes=26_542_640, seconds=0.04, bytes_per_second=1.5e9),
    group_bytes=500.0,
    reference_bytes=2000.0,
)


def test_what_is_carried_counts_bytes_tasks_and_references():
    found = scaling.carried(CONSTANTS, scaling.Cluster(), 1e9)
    assert found["bytes read: a pass, a fit (two sides, four passes)"] == [2.56e12, 4 * 2.56e12]
    assert found["tasks of a pass"] == round(1e9 / 131_072)
    bounds = found["seconds a pass, by bound"]
    assert bounds["reading"] == pytest.approx(2.56e12 / (100 * 12.5e9 / 8), abs=0.1)
    assert bounds["processors"] == pytest.approx(1e9 * 2e-5 / 3200, abs=0.1)
    assert found["a pass is bound by"] == max(bounds, key=bounds.get) == "driver"
    assert found["references while ids are compared"] == round(1e9 / 8192 / 64 * 126)


def test_twice_the_nodes_halve_what_nodes_do_and_leave_the_driver_as_it_is():
    once, twice = (
        scaling.carried(CONSTANTS, scaling.Cluster(nodes=nodes), 1e9)["seconds a pass, by bound"]
        for nodes in (100, 200)
    )
    assert twice["reading"] == pytest.approx(once["reading"] / 2, abs=0.1)
    assert twice["processors"] == pytest.approx(once["processors"] / 2, abs=0.1)
    assert twice["driver"] == once["driver"]


def test_the_model_of_stage_one_counts_tokens():
    found = scaling.stage_one(1e6, 60, 576, 8e9, 4e14)
    assert found["tokens"] == 636e6
    assert found["device hours"] == pytest.approx(636e6 * 6 * 8e9 / 4e14 / 3600)


def test_the_model_counts_with_the_sizes_of_the_code():
    from revision_ray.align import map_reduce
    from revision_ray.data import finish, shards

    assert scaling.ROWS_PER_GROUP == shards.ROWS_PER_ROW_GROUP
    assert scaling.GROUPS_PER_TASK == map_reduce._MOST_ROW_GROUPS_PER_TASK
    assert finish._ROWS_PER_PARTITION == 8_000_000
    assert scaling.SHARDS_PER_TASK == finish._SHARDS_PER_TASK
