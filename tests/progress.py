"""Record of the tests that passed, for `--go-on`, with which `make test-slow` is stopped and gone on with.

A test that has passed is left out for as long as the code that it runs is the same; the table at the end
shows all selected tests, whenever they ran. Each result is written at once, so that a killed run loses only
the test that was at work. The record lies in pytest's cache: `--cache-clear` starts afresh.
"""

import hashlib
import json
import re
import signal
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import pytest

CODE = ("revision_ray", "jobs", "configs", "tests", "cluster.yaml", "constraints.txt", "pyproject.toml")
SLOW_TIMEOUT_SECONDS = 1800
"""For one test with its fixtures, which take minutes where nothing else runs."""


@dataclass(frozen=True)
class Result:
    test: str
    outcome: str
    """passed, failed, skipped, or outdated: the code changed while it ran."""
    seconds: float
    """With the fixtures that were made for it."""
    reason: str
    """Why it was skipped."""
    code: str
    """Hash of the code that it ran."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--go-on", action="store_true", help="leave out what passed on the same code")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--go-on"):
        assert config.cache, "the record lies in pytest's cache"
        record = config.cache.mkdir("progress") / "results.jsonl"
        config.pluginmanager.register(Progress(config.rootpath, record))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_SECONDS))


def code_of(test_file: Path, root: Path) -> str:
    """Return the hash of what the tests of a file run: the product, what tests share, and the file itself."""
    files = {path for name in CODE for path in (root / name, *(root / name).rglob("*")) if path.is_file()}
    of_tests = {path for path in files if re.fullmatch(r"test_\w+\.py", path.name)}
    imported = re.findall(r"^from (test_\w+) import", test_file.read_text(), re.MULTILINE)
    own = {test_file, *(test_file.with_name(f"{name}.py") for name in imported)}
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted((files - of_tests) | own):
        if "__pycache__" not in path.parts:
            digest.update(f"\0{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def claim_of(item: pytest.Item) -> str:
    """Return the first paragraph of the test's docstring, or its name."""
    function = getattr(item, "function", None)
    text = (function and function.__doc__) or item.name.split("[")[0].removeprefix("test_").replace("_", " ")
    return " ".join(text.strip().split("\n\n")[0].split())


class Progress:
    """Results of this run and, from the record, of earlier ones."""

    def __init__(self, root: Path, record: Path) -> None:
        self._root = root
        self._record = record
        self._tests: list[pytest.Item] = []
        self._code: dict[Path, str] = {}
        self._results: dict[str, Result] = {}
        self._reports: list[pytest.TestReport] = []
        for line in record.read_text().splitlines() if record.exists() else []:
            if line.endswith("}"):  # not cut off
                result = Result(**json.loads(line))
                self._results[result.test] = result

    def _result(self, item: pytest.Item) -> Result | None:
        """Return the newest result on the code of this run."""
        result = self._results.get(item.nodeid)
        return result if result and result.code == self._code[item.path] else None

    def _outcome(self, item: pytest.Item) -> str:
        result = self._result(item)
        return result.outcome if result else "not run"

    def _outcomes(self, items: list[pytest.Item]) -> str:
        count = Counter(map(self._outcome, items))
        return ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items()))

    def _seconds(self, items: list[pytest.Item]) -> float:
        return sum(result.seconds for result in map(self._result, items) if result)

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self._tests = list(items)
        self._code = {path: code_of(path, self._root) for path in {item.path for item in items}}
        passed = [item for item in items if self._outcome(item) == "passed"]
        config.hook.pytest_deselected(items=passed)
        items[:] = [item for item in items if item not in passed]

    def pytest_report_collectionfinish(self, items: list[pytest.Item]) -> str:
        text = f"{len(self._tests) - len(items)} passed before on this code, {len(items)} are to run"
        known = [self._results[item.nodeid].seconds for item in items if item.nodeid in self._results]
        return f"{text}; {len(known)} of these took {sum(known):.0f} s the last time" if known else text

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        # As Ctrl-C: what tests have started is ended. Ray takes the signal for itself whenever it starts.
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)
        if report.when != "teardown":
            return
        reports, self._reports = self._reports, []
        outcomes = {each.outcome for each in reports}
        outcome = next((each for each in ("failed", "skipped") if each in outcomes), "passed")
        (path,) = {item.path for item in self._tests if item.nodeid == report.nodeid}
        if outcome == "passed" and code_of(path, self._root) != self._code[path]:
            outcome = "outdated"
        seconds = round(sum(each.duration for each in reports), 1)
        reason = next((each.longrepr[2] for each in reports if isinstance(each.longrepr, tuple)), "")
        result = Result(report.nodeid, outcome, seconds, reason, self._code[path])
        self._results[result.test] = result
        with self._record.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._tests:
            session.exitstatus = pytest.ExitCode.OK  # all of them passed before

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
        write = terminalreporter.write_line
        terminalreporter.section("what was shown")
        write(f"{'result':<20} {'seconds':>7}  claim")
        for path, of_file in groupby(self._tests, lambda item: item.path):
            write(str(path.relative_to(self._root)))
            for _, of_claim in groupby(of_file, lambda item: item.nodeid.split("[")[0]):
                items = list(of_claim)
                result = self._outcomes(items) if len(items) > 1 else self._outcome(items[0])
                write(f"{result:<20} {self._seconds(items):>7.1f}  {claim_of(items[0])}")
                for reason in {found.reason for found in map(self._result, items) if found} - {""}:
                    write(f"{'':<28}  {reason}")
        write(f"{self._outcomes(self._tests)}; {self._seconds(self._tests):.0f} s, fixtures included")
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._tests:
            write("All passed already on this code: `make test-slow AFRESH=1` runs them again.")
