"""The errors that a user can cause and mend. Broken invariants of our own are `assert`."""


class RevisionError(Exception):
    """Base of all errors whose message says what was found, where, and what to do."""


class ConfigError(RevisionError):
    """The configuration names something that does not exist or cannot be."""


class DataError(RevisionError):
    """Input data, or storage that holds it, cannot be read or written as asked."""


class AlignmentError(RevisionError):
    """A fit cannot be made, loaded, or applied to these embeddings."""


class CheckpointError(RevisionError):
    """A checkpoint is missing, damaged, or of another model."""


class ClusterError(RevisionError):
    """The cluster lacks what a job needs."""
