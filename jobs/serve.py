"""Serve a model behind the OpenAI API, with a chat page, until Ctrl-C; see configs/serve.yaml."""

from revision_ray.core.config import run_job
from revision_ray.serve.app import run_serve
from revision_ray.serve.settings import ServeJob

if __name__ == "__main__":
    run_job(ServeJob, run_serve)
