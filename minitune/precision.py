"""Names of the dtypes that a recipe may choose.

What trains is fp32 under all of them: adapters are fp32 parameters, cast where they are used (`adapters/lora.py`);
weights that train in bf16 have fp32 masters, split in two (`masters.py`).
"""

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
