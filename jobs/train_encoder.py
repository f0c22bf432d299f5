"""Train a dual encoder from scratch on image-caption pairs, with Ray Train."""

from revision_ray.core.config import run_job
from revision_ray.train import from_scratch
from revision_ray.train.contrastive import EncoderTraining

if __name__ == "__main__":
    run_job(EncoderTraining, from_scratch.run_train_encoder)
