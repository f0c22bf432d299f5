"""The job that trains a dual encoder from scratch, or finds it finished."""

from collections.abc import Sequence

from revision_ray.core import cluster, config, storage
from revision_ray.core.stage import Stage, StageKind, StageWork, reads_keys, worker_gpus
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


# --- as a stage of a chain ----------------------------------------------------------------------------------


def _encoder_rows(job: EncoderTraining) -> int:
    return job.num_steps * job.global_batch_size


def _encoder_summary(stages: Sequence[Stage]) -> str:
    lines = []
    for stage in stages:
        heldout = stage.proof()["heldout"]
        lines.append(
            f"Encoder trained from scratch: R@1 of {heldout['num_pairs']} held-out pairs "
            f"{heldout['image_to_text_r1']:.2f} image to text, "
            f"{heldout['text_to_image_r1']:.2f} text to image."
        )
    return "\n".join(lines)


ENCODER_STAGE = StageKind(
    name="train_encoder",
    job=EncoderTraining,
    run=run_train_encoder,
    reads=reads_keys("data", "heldout", "model"),
    proof="metrics.json",
    sources=("data", "heldout"),
    work=lambda _, stage: StageWork(rows=_encoder_rows(stage.job), tokens=0, uses_gpu=True),
    done=lambda stage: {"rows": _encoder_rows(stage.job)},
    gpus=worker_gpus,
    summary=_encoder_summary,
)
