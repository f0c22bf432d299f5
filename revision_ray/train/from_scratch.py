"""The dual encoder and the miniature's language model as jobs: trained from scratch, or found finished."""

from revision_ray.core import cluster, config, storage
from revision_ray.train.contrastive import EncoderTraining, train_encoder
from revision_ray.train.language_model import LanguageTraining, train_language_model


def run_train_encoder(job: EncoderTraining) -> str:
    """The encoder stands at the job's output, beside its settings; how well it retrieves."""
    cluster.connect()
    metrics, trained = train_encoder(job)
    config.save_resolved(job, storage.join(storage.absolute(job.output), "train_encoder.yaml"))
    heldout = metrics["heldout"]
    figure = f"; its way there: {storage.join(job.output, 'dynamics.png')}" if job.monitor.enabled else ""
    return (
        f"{'trained' if trained else 'already there'}: {job.output}; "
        f"R@1 of {heldout['num_pairs']} held-out pairs {heldout['image_to_text_r1']:.3f} image to text, "
        f"{heldout['text_to_image_r1']:.3f} text to image; modality gap {heldout['modality_gap']:.3f}, "
        f"traces {heldout['image_trace']:.3f} (image) and {heldout['text_trace']:.3f} (text){figure}"
    )


def run_train_language_model(job: LanguageTraining) -> str:
    """The language model stands at the job's output, beside its settings; how well it answers."""
    cluster.connect()
    metrics, trained = train_language_model(job)
    config.save_resolved(job, storage.join(storage.absolute(job.output), "train_language_model.yaml"))
    heldout = metrics["heldout"]
    answers = ", ".join(f"{kind} {share:.2f}" for kind, share in heldout["answers"].items())
    return (
        f"{'trained' if trained else 'already there'}: {job.output}; right answers about "
        f"{heldout['num_scenes']} held-out captions: {answers}"
    )
