"""Train the miniature world's language model on text alone, with Ray Train."""

from revision_ray.core.config import run_job
from revision_ray.train import from_scratch
from revision_ray.train.language_model import LanguageTraining

if __name__ == "__main__":
    run_job(LanguageTraining, from_scratch.run_train_language_model)
