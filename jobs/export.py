"""Write the model of any checkpoint of a pretrain or finetune run as a transformers folder."""

from revision_ray.core.config import run_job
from revision_ray.train.export_job import ExportJob, run_export

if __name__ == "__main__":
    run_job(ExportJob, run_export)
