"""What every folder uses: errors, configuration, storage, locks of outputs, the cluster, logs, metrics."""

from .cluster import connect
from .config import run_job
from .errors import AlignmentError, CheckpointError, ClusterError, ConfigError, DataError, RevisionError

__all__ = [
    "AlignmentError",
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "RevisionError",
    "connect",
    "run_job",
]
