"""The working directory that `ray job submit` uploads: what git tracks, far below what Ray takes."""

import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest
from heads import ROOT
from ray._private.ray_constants import GRPC_CPP_MAX_MESSAGE_SIZE
from ray._private.runtime_env.packaging import create_package

# Of the 512 MiB that Ray takes. Every submission carries it, and every node that a job reaches unpacks it.
LIMIT = 16 * 2**20


def packed(folder: Path, archive: Path) -> dict[str, int]:
    """Compressed or not, what each file adds to the archive that Ray makes of `folder`."""
    create_package(str(folder), archive, include_gitignore=True)
    with ZipFile(archive) as opened:
        return {entry.filename: entry.compress_size for entry in opened.infolist() if not entry.is_dir()}


def check(archive: Path, sizes: dict[str, int]) -> None:
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:10]
    listed = "\n".join(f"{sizes[name]:>12,} {name}" for name in largest)
    total = archive.stat().st_size
    assert total < LIMIT, (
        f"the working directory has {total:,} bytes, at most {LIMIT:,} are wanted:\n{listed}"
    )


@pytest.fixture
def clone(tmp_path) -> Path:
    """The files that git tracks, as they are now, and nothing else."""
    if not (ROOT / ".git").exists():
        pytest.skip("only a clone knows what git tracks")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    folder = tmp_path / "clone"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_working_directory_is_far_below_rays_limit(clone, tmp_path):
    assert GRPC_CPP_MAX_MESSAGE_SIZE >= 16 * LIMIT, "Ray takes less than it did"
    sizes = packed(clone, tmp_path / "package.zip")
    assert {"jobs/fit.py", "revision_ray/core/storage.py", "configs/fit.yaml"} <= sizes.keys()
    check(tmp_path / "package.zip", sizes)


def test_what_a_user_has_beside_it_stays_at_home(clone, tmp_path):
    """Environments, runs and caches, as README and Makefile make them, are named in .gitignore."""
    tracked = packed(clone, tmp_path / "tracked.zip")
    for name in (".venv/lib/x.so", "runs/demo/model.safetensors", ".cache/x", "jobs/__pycache__/fit.pyc"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(bytes(LIMIT))
    assert packed(clone, tmp_path / "all.zip") == tracked


def test_a_file_that_is_too_large_is_named(clone, tmp_path):
    (clone / "docs" / "film.mp4").write_bytes(bytes(LIMIT))
    sizes = packed(clone, tmp_path / "package.zip")
    with pytest.raises(AssertionError, match=r"16,777,216 docs/film\.mp4"):
        check(tmp_path / "package.zip", sizes)
