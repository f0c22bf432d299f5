"""Train the miniature world's language model on text alone, with Ray Train."""

from revision_ray.core.config import run_job
from revision_ray.miniature.language_model import LanguageTraining, run_train_language_model

if __name__ == "__main__":
    run_job(LanguageTraining, run_train_language_model)
