"""The job that trains a dual encoder from scratch, or finds it finished."""

from revision_ray.core import cluster, config, storage
from revision_ray.train.contrastive import EncoderTraining, train_encoder


def run_train_encoder(job: EncoderTraining) -> str:
    """Train the encoder, save the settings beside it; return how well it retrieves."""
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
