from compress_peft.training.loop import TrainingResult, train
from compress_peft.training.settings import TrainingSettings

__all__ = ["TrainingResult", "TrainingSettings", "train"]
