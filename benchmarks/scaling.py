"""The cost model of docs/results/scaling.md: its constants measured, checked, and carried to a large cluster.

    python -m benchmarks.scaling [folder=runs/bench] [rows=100000,1000000,4000000] [workers=1,2,3,4]

Every figure is of a process of its own. A pass is one reading of a store of texts: for their moments, or
mapped: for those of the rows as a fit maps them. A fit is one pass of each side for the moments, and two
mapped ones of the texts.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import reduction
from benchmarks.data import make_store

DIM = 1280
ROWS_PER_GROUP, GROUPS_PER_TASK, ROWS_PER_SHARD, SHARDS_PER_TASK = 2048, 64, 8192, 64
_EMPTY_TASKS = 1000
_ID_SHARDS = (200, 400, 800)


# --- the model --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What was measured; seconds and bytes."""

    start_up: float
    """Of a moments pass on a Ray that runs: planning, the first tasks, the end."""
    row: float
    """CPU seconds a row of it, reading from a warm disk cache included."""
    mapped_start_up: float
    mapped_row: float
    """The same of a mapped pass."""
    task: float
    """Driver seconds a task: scheduling, taking the result, adding it."""
    merge: reduction.Merge
    """Of means and traces."""
    second_merge: reduction.Merge
    """Of second moments."""
    group_bytes: float
    """Driver memory a row group, its part of the plan included."""
    reference_bytes: float
    """Driver memory a small object that it holds a reference to."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What work is carried to."""

    nodes: int = 100
    cpus: int = 32
    network: float = 12.5e9 / 8
    """Bytes a second and node, from the object store of a cloud."""


def pass_seconds(constants: Constants, rows: float, workers: float, mapped: bool = False) -> float:
    """A pass on one machine that the processor bounds."""
    if mapped:
        return constants.mapped_start_up + rows * constants.mapped_row / workers
    return constants.start_up + rows * constants.row / workers


def fitted(points: list[dict[str, float]], cores: int) -> tuple[float, float]:
    """(start-up, CPU seconds a row) of `seconds = start_up + rows * row / min(workers, cores)`, which weighs
    relative errors equally."""
    weights = np.array([1 / point["seconds"] for point in points])
    columns = np.array([[1.0, point["rows"] / min(point["workers"], cores)] for point in points])
    solution, *_ = np.linalg.lstsq(columns * weights[:, None], np.ones(len(points)), rcond=None)
    return float(solution[0]), float(solution[1])


def carried(constants: Constants, cluster: Cluster, rows: float, dim: int = DIM, row_bytes: int = 2) -> dict:
    """What a fit of `rows` texts and as many images asks of the cluster, and what bounds each pass."""
    cpus = cluster.nodes * cluster.cpus
    tasks = rows / (ROWS_PER_GROUP * GROUPS_PER_TASK)
    groups, hashing = rows / ROWS_PER_GROUP, rows / ROWS_PER_SHARD / SHARDS_PER_TASK
    store_bytes = rows * dim * row_bytes
    partitions = 1 + rows // 8_000_000
    bounds = {
        "reading": store_bytes / (cluster.nodes * cluster.network),
        "processors": rows * max(constants.row, constants.mapped_row) / cpus,
        "driver": tasks * constants.task,
    }
    second = tasks * max(constants.second_merge.service, constants.task)
    return {
        "bytes read: a pass, a fit (two sides, four passes)": [store_bytes, 4 * store_bytes],
        "tasks of a pass": round(tasks),
        "seconds a pass, by bound": {name: round(value, 1) for name, value in bounds.items()},
        "a pass is bound by": max(bounds, key=lambda name: bounds[name]),
        "bytes to the driver a pass": round(tasks * constants.merge.num_bytes),
        "seconds of merging a pass": round(tasks * constants.merge.seconds, 1),
        "the same with second moments": {
            "bytes to the driver": round(tasks * constants.second_merge.num_bytes),
            "seconds of the driver": round(second, 1),
        },
        "driver memory for the plan of both sides, GB": round(2 * groups * constants.group_bytes / 1e9, 2),
        "object store at once, GB": round(cpus * constants.merge.num_bytes / 1e9, 2),
        "the same with second moments, GB": round(cpus * constants.second_merge.num_bytes / 1e9, 1),
        "references while ids are compared": round(hashing * partitions),
        "driver memory for them, GB": round(hashing * partitions * constants.reference_bytes / 1e9, 2),
        "the same with a task a shard, GB": round(
            SHARDS_PER_TASK * hashing * partitions * constants.reference_bytes / 1e9, 1
        ),
    }


def stage_one(rows: float, text_tokens: int, visual_tokens: int, parameters: float, flops: float) -> dict:
    """Tokens of an epoch of stage 1 over captions, and device hours.

    The language model is frozen and its activations are made again on the way back: a token costs two forward
    passes and the way of the gradient to the projector, 6 operations a parameter.
    """
    tokens = rows * (text_tokens + visual_tokens)
    return {"tokens": tokens, "device hours": tokens * 6 * parameters / flops / 3600}


# --- the measurements -------------------------------------------------------------------------------------


def _in_process(name: str, *arguments: object) -> dict[str, Any]:
    """What `MEASURED[name]` gives in a process of its own."""
    command = [sys.executable, __file__, f"only={name}", json.dumps(arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_WAIT_POLICY": "passive"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def _start_ray(workers: int) -> Any:
    import logging

    import ray

    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=10**9,
        logging_level=logging.ERROR,
    )
    return ray


def passes(uri: str, workers: int) -> dict[str, float]:
    """Seconds of a moments pass and of a mapped pass on a Ray whose workers have started."""
    from revision_ray.align.map_reduce import store_moments
    from revision_ray.align.strategies import StrategyConfig, fit_map
    from revision_ray.data.store import open_stores

    _start_ray(workers)
    store = open_stores([uri], "text")
    warm, _ = store_moments(replace(store, row_groups=store.row_groups[: 2 * workers]), "warm")
    affine = fit_map(warm, warm, StrategyConfig())
    store_moments(replace(store, row_groups=store.row_groups[: 2 * workers]), "warm", affine=affine)
    found = {"rows": float(store.num_rows), "workers": float(workers)}
    for name, mapped in (("seconds", None), ("mapped seconds", affine)):
        start = time.perf_counter()
        store_moments(store, name, affine=mapped)
        found[name] = time.perf_counter() - start
    found["driver's memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return found


def empty_tasks(number: int) -> dict[str, float]:
    """Driver seconds a task whose work is nothing and whose result is a fit's: Ray Data, arrival, merge."""
    from revision_ray.align.moments import Moments
    from revision_ray.core.cluster import data_context

    ray = _start_ray(2)
    (part,) = reduction.partial_results(DIM, False, 1)
    ref = ray.put(part)

    def nothing(item: dict[str, Any]) -> dict[str, Any]:
        return {"moments": ray.get(ref)}

    found = {}
    for name, size in (("warm", 50), ("seconds", number)):
        total = Moments.zeros(DIM)
        start = time.perf_counter()
        with data_context() as context:
            context.op_resource_reservation_enabled = False
            items = [{"row_groups": " " * 16_000} for _ in range(size)]
            for row in ray.data.from_items(items, override_num_blocks=size).map(nothing).iter_rows():
                total.merge(Moments.from_bytes(row["moments"]))
        found[name] = time.perf_counter() - start
    return {"tasks": number, "seconds a task": (found["seconds"] - found["warm"]) / (number - 50)}


def plan(rows: int) -> dict[str, float]:
    """Driver memory for the row groups of a store of `rows` rows and for the tasks' descriptions."""
    from revision_ray.data.store import RowGroup

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, start = resident(), time.perf_counter()
    groups = [
        RowGroup(
            uri=f"s3://bucket/texts/part-{index // 4:032x}-00000.parquet",
            shard_hash=f"{index // 4:064x}",
            index=index % 4,
            num_rows=ROWS_PER_GROUP,
        )
        for index in range(rows // ROWS_PER_GROUP)
    ]
    items = [
        {"row_groups": json.dumps([asdict(group) for group in groups[first : first + GROUPS_PER_TASK]])}
        for first in range(0, len(groups), GROUPS_PER_TASK)
    ]
    return {
        "row groups": len(groups),
        "tasks": len(items),
        "bytes a row group": (resident() - before) / len(groups),
        "seconds": time.perf_counter() - start,
    }


def references(number: int, returns: int) -> dict[str, float]:
    """Driver memory a reference to one of `returns` small arrays of each task: so ids are compared."""
    ray = _start_ray(2)

    @ray.remote(num_cpus=1, num_returns=returns)
    def parts() -> list[np.ndarray]:
        return [np.zeros(ROWS_PER_SHARD // returns * 32, np.uint8) for _ in range(returns)]

    ray.get(parts.remote())
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    start = time.perf_counter()
    held = [parts.remote() for _ in range(number)]
    flat = [reference for references in held for reference in references]
    ray.wait(flat, num_returns=len(flat), fetch_local=False)
    after = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "references": len(flat),
        "bytes a reference": (after - before) / len(flat),
        "seconds": time.perf_counter() - start,
    }


MEASURED: dict[str, Callable[..., dict[str, Any]]] = {
    "passes": passes,
    "empty_tasks": empty_tasks,
    "plan": plan,
    "references": references,
    "reduction": reduction.main,
}


def main(folder: Path, rows: list[int], workers: list[int]) -> dict[str, Any]:
    stores = {n: make_store(folder / f"text-{n}", "text", n, DIM) for n in rows}
    return carried_from(
        points=[_in_process("passes", stores[n], w) for n in rows for w in workers],
        tasks=_in_process("empty_tasks", _EMPTY_TASKS),
        planned=_in_process("plan", 100_000_000),
        held=[_in_process("references", number, 64) for number in _ID_SHARDS],
        reduced=_in_process("reduction", 10_000, DIM, 32),
        cores=os.cpu_count() or 1,
    )


def carried_from(
    points: list[dict[str, float]],
    tasks: dict[str, float],
    planned: dict[str, float],
    held: list[dict[str, float]],
    reduced: dict[str, Any],
    cores: int,
) -> dict[str, Any]:
    """The measurements beside the model, its constants, and what they come to on a large cluster."""
    start_up, row = fitted(points, cores)
    mapped = [{**point, "seconds": point["mapped seconds"]} for point in points]
    mapped_start_up, mapped_row = fitted(mapped, cores)
    merge, second_merge = (
        reduction.Merge(
            num_bytes=reduced[name]["measured"]["bytes of one"],
            seconds=reduced[name]["measured"]["milliseconds a merge"] / 1e3,
            bytes_per_second=Cluster().network,
        )
        for name in ("means", "second moments")
    )
    constants = Constants(
        start_up=start_up,
        row=row,
        mapped_start_up=mapped_start_up,
        mapped_row=mapped_row,
        task=tasks["seconds a task"],
        merge=merge,
        second_merge=second_merge,
        group_bytes=planned["bytes a row group"],
        reference_bytes=held[-1]["bytes a reference"],
    )
    for point in points:
        for name, is_mapped in (("seconds", False), ("mapped seconds", True)):
            model = pass_seconds(constants, point["rows"], min(point["workers"], cores), is_mapped)
            point[f"model over {name}"] = round(model / point[name], 3)
    return {
        "cores": cores,
        "passes": points,
        "tasks": tasks,
        "plan": planned,
        "references": held,
        "reduction": reduced,
        "constants": asdict(constants),
        "1e9 rows a side, 100 nodes": carried(constants, Cluster(), 1e9),
        # 60 tokens of caption, 576 visual ones, 8 B parameters, 40 % of an H100's 989e12 operations a second.
        "stage 1": {f"{rows:.0e}": stage_one(rows, 60, 576, 8e9, 0.4 * 989e12) for rows in (1e6, 2e6, 1e9)},
    }


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("only="):
        measured = MEASURED[sys.argv[1].partition("=")[2]](*json.loads(sys.argv[2]))
        print(json.dumps(measured))
    else:
        options = dict(argument.split("=") for argument in sys.argv[1:])
        result = main(
            Path(options.get("folder", "runs/bench")),
            [int(n) for n in options.get("rows", "100000,1000000,4000000").split(",")],
            [int(n) for n in options.get("workers", "1,2,3,4").split(",")],
        )
        print(json.dumps(result, indent=2))
