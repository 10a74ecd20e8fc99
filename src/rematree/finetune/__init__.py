"""The fine-tuning job: a model, a data set and a number of bytes.

`config.py` says what a run is, `job.py` is the order of operations, `demo.py` the same job on the built-in model and
data with half the memory of checkpointing every layer. Nothing here imports torch before a run starts.
"""

from rematree.finetune.config import TrainConfig as TrainConfig

__all__ = ["TrainConfig"]
