"""Runs that go on with what has not passed on the same code: what `make test-slow` is made of."""

from pathlib import Path

import pytest

TESTS = '''
import os, signal
from pathlib import Path

def test_first():
    """The first claim holds."""

def test_second():
    """The second claim holds."""
    if Path("kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    assert Path("mended").exists()
'''


@pytest.fixture
def go_on(pytester, monkeypatch):
    """Run a project of two tests in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds
    pytester.path.joinpath("tests").mkdir()
    pytester.path.joinpath("tests/test_two.py").write_text(TESTS)
    return lambda *options: pytester.runpytest_subprocess("-p", "progress", "--go-on", *options)


def test_a_run_goes_on_with_what_has_not_passed_on_the_same_code(go_on, pytester):
    kill = pytester.path / "kill"
    kill.touch()
    assert go_on().ret < 0, "killed in the second test"
    kill.unlink()
    failed = go_on()
    failed.assert_outcomes(failed=1, deselected=1)
    failed.stdout.fnmatch_lines(["passed *The first claim holds.", "failed *The second claim holds."])
    failed.stdout.fnmatch_lines(["1 failed, 1 passed; *"])
    (pytester.path / "mended").touch()
    go_on().assert_outcomes(passed=1, deselected=1)
    whole = go_on()
    whole.assert_outcomes(deselected=2)
    assert whole.ret == pytest.ExitCode.OK
    whole.stdout.fnmatch_lines(["passed *The second claim holds.", "2 passed; *", "All passed already *"])


def test_changed_code_and_a_cleared_cache_start_afresh(go_on, pytester):
    (pytester.path / "mended").touch()
    go_on().assert_outcomes(passed=2)
    (pytester.path / "pyproject.toml").write_text("[project]\n")
    go_on().assert_outcomes(passed=2)
    go_on("--cache-clear").assert_outcomes(passed=2)
