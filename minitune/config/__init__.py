"""The recipe of a run: every knob with its default, read from TOML and from `key.path=value`.

keys.py is the one list of knobs; together.py, what depends on more than one of them; reading.py, from a command line to
a Config and back. All that is wrong with a recipe is found here and said at once, before torch is loaded.
"""

from minitune.config.keys import (
    ENDS,
    LINEARS,
    LORA_VARIANTS,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SaveConfig,
    TrainConfig,
    knobs,
    what_is_wrong,
)
from minitune.config.reading import EXAMPLE, ConfigError, dump, load_config, read_value, usage

__all__ = [
    "ENDS",
    "EXAMPLE",
    "LINEARS",
    "LORA_VARIANTS",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LoRAConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "SaveConfig",
    "TrainConfig",
    "dump",
    "knobs",
    "load_config",
    "read_value",
    "usage",
    "what_is_wrong",
]
