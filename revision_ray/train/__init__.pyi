"""Train: stage 1, stage 2, and models from scratch."""

from .contrastive import EncoderTraining, train_encoder
from .export_job import ExportJob, run_export
from .language_model import LanguageModelTraining, train_language_model
from .stages import FinetuneJob, PretrainJob, finetune, pretrain

__all__ = [
    "EncoderTraining",
    "ExportJob",
    "FinetuneJob",
    "LanguageModelTraining",
    "PretrainJob",
    "finetune",
    "pretrain",
    "run_export",
    "train_encoder",
    "train_language_model",
]
