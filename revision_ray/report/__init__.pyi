"""Measure the geometry of a modality gap, and write the report: figures, claims, verdict, page."""

from .report import ReportJob, run_report

__all__ = [
    "ReportJob",
    "run_report",
]
