"""What a training worker does before anything else."""

import logging

import torch

from revision_ray.core import logs


def set_up(stage: str, output: str, rank: int, num_cpus: float) -> None:
    """Torch works on the worker's CPUs; the first worker speaks for all. Lines and metrics name the stage and
    the run that the driver works for, those given where it works for none (a script of one's own).

    Others speak up for warnings alone: Ray Train repeats what the run says itself.
    """
    torch.set_num_threads(max(1, int(num_cpus)))
    logs.set_up(logging.INFO if rank == 0 else logging.WARNING, "%(message)s")
    if not logs.current().stage:
        logs.work_for(stage, output)
    for handler in logging.getLogger().handlers:
        handler.addFilter(
            lambda record: record.levelno >= logging.WARNING or record.name.startswith("revision_ray")
        )
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no compilers of GPUs there
