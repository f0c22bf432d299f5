"""Report on the modality gap of an encoder's embeddings, and on fits that close it."""

from revision_ray.core.config import run_job
from revision_ray.report.report import ReportJob, run_report

if __name__ == "__main__":
    run_job(ReportJob, run_report)
