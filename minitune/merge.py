"""Fold a run's adapter into its base: a model folder that needs neither minitune nor PEFT.

Each product W + (alpha / r) B A is summed in fp64 and rounded once. A QLoRA adapter was trained on the four-bit
weights, so by default those are what it is added to; added to the original weights instead, it corrects errors
that are no longer there. Both differences are measured and told.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitune import adapters, files, parallel, peft_format, pretrained, runs, shards
from minitune.build import compose
from minitune.config import Config
from minitune.errors import UserError
from minitune.model import Llama
from minitune.nf4 import NF4Linear
from minitune.precision import DTYPES, rounded

CPU = torch.device("cpu")


@dataclass
class MergeError:
    """Squared Frobenius norms over all adapted weights."""

    update: float = 0.0  # of what the adapter adds
    weight: float = 0.0  # of the original weights
    rounding: float = 0.0  # of what rounding to the files' dtype changes
    quantization: float = 0.0  # of four-bit weights minus original ones; 0 unless the run is qlora

    def lines(self, base: str) -> list[str]:
        """What a person should know of it."""
        update = max(self.update, 1e-300)
        told = [
            f"the update is {(self.update / max(self.weight, 1e-300)) ** 0.5:.3%} of the weights (Frobenius norm)",
            f"rounding to the files' dtype changes the weights by {(self.rounding / update) ** 0.5:.3%} of the update",
        ]
        if self.quantization:
            ratio = (self.quantization / update) ** 0.5
            other = "are exactly those trained on" if base == "dequantized" else f"are {ratio:.3g} updates away from it"
            told.append(
                f"the four-bit weights trained on differ from the original ones by {ratio:.3g} times the update; "
                f"with --base {base} the weights under it {other}"
            )
        return told


def merge(run: Path, out: Path, base: str = "dequantized", dtype: str | None = None) -> MergeError:
    """Write the merged model of `run` to the new folder `out`; dtype None keeps that of the base's files.

    base: "dequantized" adds to the weights that were trained on (in four bits for qlora, in the recipe's dtype
    otherwise), "original" to those of the base's files.
    """
    cfg, folder = runs.open_run(run)
    if cfg.method == "full":
        raise UserError(f"{run} trained the whole model: {run / 'model'} is already what a merge would give")
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out, or delete it")
    files.make_folder(out.parent)
    model, _ = compose(cfg, folder, CPU)
    parallel.materialize(adapters.own_modules(model), CPU)  # the adapters alone need memory
    peft_format.load(run / "adapter", model)
    found = MergeError()
    with shards.Shards(folder) as weights:
        shards.save(out, merged_tensors(cfg, model, weights, base, dtype, found), like=folder)
    return found


@torch.no_grad()
def merged_tensors(
    cfg: Config, model: Llama, weights: shards.Shards, base: str, dtype: str | None, found: MergeError
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the base, adapted where an adapter is, one at a time; adds to `found` as it goes."""
    adapted = {f"{name}.weight": adapter for name, adapter in adapters.adapters(model).items()}
    leaves = pretrained.base_leaves(model)
    for name in weights.names():
        if name.endswith(".rotary_emb.inv_freq"):
            continue  # a table that old exports carry and nothing reads
        original = weights.tensor(name)
        target = DTYPES[dtype] if dtype else original.dtype
        trained_on = original.to(DTYPES[cfg.model.dtype])
        quantized = name in leaves and isinstance(leaves[name][0], NF4Linear) and original.ndim == 2
        if quantized:
            trained_on = through_four_bits(trained_on)
        weight = trained_on if base == "dequantized" else original
        exact = adapted[name].merged_weight(weight.double()) if name in adapted else weight
        merged = rounded(exact, target)
        if not merged.isfinite().all():
            raise UserError(f"{name} has weights that {target} cannot hold; choose another --dtype")
        if name not in adapted:
            yield name, merged
            continue
        found.update += (exact - weight.double()).square().sum().item()
        found.weight += original.double().square().sum().item()
        if quantized:
            found.quantization += (trained_on.double() - original.double()).square().sum().item()
        found.rounding += (merged.double() - exact).square().sum().item()
        yield name, merged


def through_four_bits(weight: Tensor) -> Tensor:
    """What a weight (out, in) becomes under NF4."""
    quantized = NF4Linear(weight.shape[1], weight.shape[0], False, weight.dtype)
    quantized.quantize(weight)
    return quantized.dense_weight()
