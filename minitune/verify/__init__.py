"""The proof on this machine: minitune against its references, or one adapter variant against its own promises.

    run.py       all of it, in order
    table.py     a check, its bound, and the table
    small.py     the small models, rows and steps that are checked on
    itself.py    model, packing, accumulation, NF4 and merging;  bf16.py  the dtype of GPUs
    peers.py     adapters against PEFT
    proof.py     one variant, by the four verbs alone;  given.py  a class in a file;  ranks.py  two processes

transformers and PEFT are needed for what is held to them alone, and imported there.
"""
