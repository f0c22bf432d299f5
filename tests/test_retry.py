"""Requests to object stores are made again while they fail for passing reasons, and given up at once else."""

import logging
import os

import pyarrow.parquet as pq
import pytest
from faults import first_reads

from revision_ray.core import storage
from revision_ray.core.errors import DataError
from revision_ray.data.shards import read_embeddings, read_footer

SLOW_DOWN = "When uploading part: AWS Error SLOW_DOWN during UploadPart operation: Reduce your rate."


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(storage, "SECONDS_BETWEEN", (0.01, 0.01, 0.01))


def failing(times: int, error: Exception):
    """A request that fails `times` times and then works, and the list of its attempts."""
    attempts: list[int] = []

    def attempt() -> str:
        attempts.append(len(attempts))
        if len(attempts) <= times:
            raise error
        return "found"

    return attempt, attempts


def test_a_passing_error_is_tried_again_and_said(caplog):
    attempt, attempts = failing(3, OSError(SLOW_DOWN))
    with caplog.at_level(logging.WARNING):
        assert storage.patiently("s3://b/x", attempt) == "found"
    assert len(attempts) == 4
    said = f"s3://b/x: {SLOW_DOWN}; trying again in 0.0 s"
    assert [record.message for record in caplog.records] == [said] * 3


def test_the_number_of_attempts_is_bounded():
    attempt, attempts = failing(99, OSError(SLOW_DOWN))
    with pytest.raises(OSError, match="SLOW_DOWN"):
        storage.patiently("s3://b/x", attempt)
    assert len(attempts) == len(storage.SECONDS_BETWEEN) + 1


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "no such file"),
        PermissionError(13, "HTTP status 503"),
        OSError("AWS Error ACCESS_DENIED during PutObject operation: no"),
        OSError("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: HTTP status 404"),
        ValueError("HTTP status 503"),
    ],
)
def test_what_will_be_the_same_next_time_is_raised_at_once(error):
    attempt, attempts = failing(99, error)
    with pytest.raises(type(error)):
        storage.patiently("s3://b/x", attempt)
    assert len(attempts) == 1


def first(count: int, wanted: str):
    """The first `count` requests with method `wanted` are refused."""
    seen: list[str] = []

    def refuses(method: str, path: str) -> bool:
        if method == wanted:
            seen.append(path)
        return method == wanted and len(seen) <= count

    return refuses


# pyarrow's S3 client asks 31 times in six seconds before it gives up, and for a short read, whose buffer does
# not hold the error's text, only once: more is left to us.
BEYOND_THE_CLIENT = {"POST": 35, "PUT": 35, "HEAD": 35, "GET": 2}


@pytest.mark.parametrize("method", ["POST", pytest.param("PUT", marks=pytest.mark.slow)])
def test_a_write_that_the_store_refuses_for_a_while_is_made(faltering_s3, method, caplog):
    """A write that S3 refuses for longer than its client tries is made."""
    faltering_s3.refuses = first(BEYOND_THE_CLIENT[method], method)
    uri = faltering_s3.uri(f"written-{method}")
    storage.write_bytes(uri, b"content")
    faltering_s3.refuses = first(0, method)
    assert storage.read_bytes(uri) == b"content"
    assert "trying again" in caplog.text


@pytest.mark.parametrize("method", [pytest.param("HEAD", marks=pytest.mark.slow), "GET"])
def test_a_read_that_fails_for_a_while_gives_all_bytes(faltering_s3, method, caplog):
    """A read or look-up that S3 refuses for longer than its client tries gives all bytes."""
    uri = faltering_s3.uri(f"read-{method}")
    content = os.urandom(100_000)
    storage.write_bytes(uri, content)
    faltering_s3.refuses = first(BEYOND_THE_CLIENT[method], method)
    with storage.open_input(uri) as file:
        assert file.read(10) == content[:10]
        file.seek(90_000)
        assert file.read() == content[90_000:]
        file.seek(50_000)
        assert file.read_buffer(7).to_pybytes() == content[50_000:50_007]
        assert file.size() == len(content)
    assert "trying again" in caplog.text


def test_every_object_may_fail_twice(faltering_s3, tmp_path):
    from embedding_stores import cloud, write_part

    rows_ND = cloud(50, 8, "text")
    write_part(tmp_path / "part.parquet", rows_ND, [str(row) for row in range(50)])
    uri = faltering_s3.uri("part.parquet")
    storage.write_bytes(uri, (tmp_path / "part.parquet").read_bytes())
    faltering_s3.refuses, before = first_reads(2), faltering_s3.refused
    assert read_footer(uri).num_rows == 50
    assert (read_embeddings(uri) == rows_ND).all()
    with storage.open_input(uri) as file:
        assert pq.read_table(file).num_rows == 50
    assert faltering_s3.refused == before + 2


def test_what_is_not_there_is_said_at_once(faltering_s3):
    faltering_s3.refuses = first(0, "GET")
    with pytest.raises(DataError, match="no such file"):
        storage.read_bytes(faltering_s3.uri("nowhere"))
