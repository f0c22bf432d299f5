"""Check a cluster before money is spent on it."""

from .examine import DoctorJob, run_doctor

__all__ = [
    "DoctorJob",
    "run_doctor",
]
