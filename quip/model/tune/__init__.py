"""Fine-tuning of quantized models, as QuIP# does it: codes stay, what is around them moves.

`blocks` tunes what is left of a block while it is being quantized, `whole` the quantized model
against its original (quip/jobs/finetune.py does that to a checkpoint). `tunable` says what is
tuned, and `descent` how.
"""

from quip.model.tune.blocks import BlockTuner, BlockTuning, TuningRecord
from quip.model.tune.whole import ModelTuning, ModelTuningRecord, tune_model

__all__ = [
    "BlockTuner",
    "BlockTuning",
    "ModelTuning",
    "ModelTuningRecord",
    "TuningRecord",
    "tune_model",
]
