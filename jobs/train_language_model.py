"""Train the miniature world's language model on text alone, with Ray Train."""

from revision_ray import cluster, config, storage
from revision_ray.train.language_model import LanguageTraining, train_language_model


def main(job: LanguageTraining) -> str:
    cluster.connect()
    metrics, trained = train_language_model(job)
    config.save_resolved(job, storage.join(storage.absolute(job.output), "train_language_model.yaml"))
    heldout = metrics["heldout"]
    answers = ", ".join(f"{kind} {share:.2f}" for kind, share in heldout["answers"].items())
    return (
        f"{'trained' if trained else 'already there'}: {job.output}; right answers about "
        f"{heldout['num_scenes']} held-out captions: {answers}"
    )


if __name__ == "__main__":
    config.run_job(LanguageTraining, main)
