"""Check a cluster before money is spent on it: nodes, GPUs, storage, versions, models, authentication."""

from revision_ray.core.config import run_job
from revision_ray.doctor.examine import DoctorJob, run_doctor

if __name__ == "__main__":
    run_job(DoctorJob, run_doctor)
