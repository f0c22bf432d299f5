"""The Grafana dashboards, and the metrics of ours that they show."""

import json
import re
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from revision_ray.core import logs, observe
from revision_ray.core.observe import Progress
from revision_ray.serve import metrics as serve_metrics

ROOT = Path(__file__).parents[1]
# Dashboard -> the instruments that it shows, all of them.
SHOWN = {
    "configs/serve/grafana.json": serve_metrics.instruments,
    "configs/cluster/grafana.json": observe.stage_instruments,
}
# Workers do not have this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

every_dashboard = pytest.mark.parametrize("path", SHOWN)


def dashboard(path: str) -> dict:
    return json.loads((ROOT / path).read_text())


def targets(path: str) -> list[dict]:
    return [target for panel in dashboard(path)["panels"] for target in panel.get("targets", [])]


def series(name: str, kind: str) -> set[str]:
    return {name + suffix for suffix in ("_bucket", "_count", "_sum")} if kind == "histogram" else {name}


def known(path: str) -> dict[str, observe.Counter | observe.Gauge | observe.Histogram]:
    return {each.exported: each for each in observe.instruments_in(SHOWN[path]())}


@every_dashboard
def test_every_metric_of_the_dashboard_is_one_of_ours_and_every_one_of_ours_is_shown(path):
    names = {name: series(name, each.kind) for name, each in known(path).items()}
    shown = set(re.findall(r"\bray_\w+", " ".join(target["expr"] for target in targets(path))))
    assert shown <= set().union(*names.values())
    assert [name for name, series_of in names.items() if not series_of & shown] == []


@every_dashboard
def test_queries_use_only_tags_that_the_metric_has(path):
    tags = {name: set(each.tags) for name, each in known(path).items()}
    for target in targets(path):
        query = target["expr"]
        names = {name.removesuffix("_bucket") for name in re.findall(r"\bray_\w+", query)}
        used = set(re.findall(r"(\w+)=", query))
        used |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        for grouped in re.findall(r"by \(([^)]*)\)", query):
            used |= set(grouped.split(", "))
        assert used - {"le"} <= set.intersection(*(tags[name] for name in names)), query


@every_dashboard
def test_a_counter_is_shown_by_its_growth_and_a_gauge_by_its_value(path):
    """As it stands a counter is shown only beside what is planned: it goes with its process."""
    for target in targets(path):
        query = target["expr"]
        for name, each in known(path).items():
            for before in re.findall(r"(\w*)\(" + name + r"\b", query):
                grows = before in ("rate", "increase")
                assert grows == (each.kind != "gauge") or "planned" in query, query


@every_dashboard
def test_the_dashboard_can_be_imported(path):
    """Into any Grafana: the data source is chosen there, panels have ids of their own and do not overlap."""
    document = dashboard(path)
    variable, *others = document["templating"]["list"]
    assert (variable["type"], variable["query"], variable["name"]) == (
        "datasource",
        "prometheus",
        "datasource",
    )
    for other in others:
        name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", other["query"]["query"]).groups()
        assert label == other["name"]
        assert label in known(path)[name].tags
    used = set(re.findall(r"\$(\w+)", " ".join(target["expr"] for target in targets(path))))
    built_in = {"__rate_interval", "__range", "__interval"}
    assert used - built_in == {other["name"] for other in others}
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own


def test_dashboards_have_names_of_their_own():
    for key in ("uid", "title"):
        assert len({dashboard(path)[key] for path in SHOWN}) == len(SHOWN)


# --- what a stage records -----------------------------------------------------------------------------------


class Recorded:
    """Stands in for an instrument: keeps what is recorded."""

    def __init__(self, instrument):
        self.tags, self.values = instrument.tags, []

    def inc(self, value, tags):
        self.values.append((value, tags))

    set = inc


@pytest.fixture
def recorded(monkeypatch):
    made = {name: Recorded(each) for name, each in vars(observe.stage_instruments()).items()}
    instruments = observe.StageInstruments(**made)
    monkeypatch.setattr(observe, "stage_instruments", lambda: instruments)
    with logs.working_for("fit", "runs/fit"):
        yield made


def test_a_stage_records_its_run_and_all_tags_of_each_instrument(recorded):
    observe.record(samples=98, rejected=2, truncated=3, tokens=50, padding_share=0.25)
    observe.record_progress("texts", "rows", 100, 400, 1.5)
    run = {"run": logs.run_id("runs/fit"), "stage": "fit"}
    found = {name: each.values for name, each in recorded.items()}
    assert found == {
        "samples": [(98, run)],
        "rejected": [(2, run)],
        "truncated": [(3, run)],
        "tokens": [(50, run)],
        "padding_share": [(0.25, run)],
        "done": [(100, {**run, "part": "texts", "unit": "rows"})],
        "planned": [(400, {**run, "part": "texts", "unit": "rows"})],
        "seconds": [(1.5, {**run, "part": "texts"})],
    }
    for each in recorded.values():
        assert set(each.values[0][1]) == set(each.tags), "Ray refuses missing and unknown tags"


def test_progress_is_recorded_once_whoever_else_shows_it(recorded):
    for counted in (True, False):
        shown = Progress("pretrain", 10, "steps", counted=counted)
        shown.advance(4)
        shown.advance(6)
    assert [value for value, _ in recorded["done"].values] == [4, 6]
    assert [value for value, _ in recorded["planned"].values] == [10, 10]


def test_what_goes_on_counts_what_was_done_before(recorded):
    Progress("pretrain", 10, "steps", already_done=6).advance(4)
    assert [value for value, _ in recorded["done"].values] == [6, 4]


@ray.remote(num_cpus=0.1)
class Recorder:
    """A worker that records once into each of the stages' instruments."""

    def record(self) -> None:
        logs.work_for("fit", "runs/fit")
        observe.record(samples=2, rejected=2, truncated=2, tokens=2, padding_share=2)
        observe.record_progress("texts", "rows", 2, 2, 2)


def exported() -> str:
    """What the exporters of this cluster's nodes say."""
    texts = []
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            texts.append(response.read().decode())
    return "".join(texts)


def test_ray_exports_every_instrument_of_a_stage_with_its_run(cluster):
    recorder = Recorder.remote()
    ray.get(recorder.record.remote())
    run = f'run="{logs.run_id("runs/fit")}"'
    wanted = {each.exported for each in observe.instruments_in(observe.stage_instruments())}
    end = time.monotonic() + 40  # a report interval is ten seconds
    while True:
        lines = [line for line in exported().splitlines() if run in line and 'stage="fit"' in line]
        seen = {line.partition("{")[0] for line in lines if float(line.rpartition(" ")[2]) == 2}
        if not (missing := wanted - seen):
            break
        assert time.monotonic() < end, f"not exported: {sorted(missing)}"
        time.sleep(1)
