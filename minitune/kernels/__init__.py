"""The operations of a training step that are worth fusing: a plain PyTorch function each, its Triton twin beside it.

The plain twin says what is computed and runs everywhere; the Triton one runs on CUDA tensors, and has to agree with
it (tests/unit/test_kernels.py under Triton's interpreter, tests/gpu on a card). Products with a whole weight are
cuBLAS's on every path. Everything is two-dimensional here: N tokens (all rows of a batch end to end) by features.

    norm.py         RMSNorm with the residual sum before it
    rotary.py       q, k, v: the adapters' part added, rotary positions turned
    swiglu.py       SwiGLU, with the adapters of gate and up inside it
    low_rank.py     the thin products of adapters: down, up, gradients; with dropout
    dropout.py      which inputs an adapter drops: a function of a seed and a place
    four_bits.py    NF4 storage made dense
    softmax.py      cross-entropy and its gradient over a piece of logits
"""
