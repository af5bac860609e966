"""The one walker that swaps leaves: LoRA, NF4 and fused kernels are all this operation."""

from collections.abc import Callable

from torch import nn


def replace(
    model: nn.Module,
    match: Callable[[str, nn.Module], bool],
    make: Callable[[nn.Module], nn.Module],
) -> list[str]:
    """Put `make(module)` in the place of each module for which `match(name, module)` holds.

    Names are full dotted paths. A module put in place is not searched again, so a wrapper may keep the
    module that it replaces. Returns the replaced names, in the order of the model.
    """
    replaced = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for child_name, child in list(parent.named_children()):
            name = prefix + child_name
            if match(name, child):
                setattr(parent, child_name, make(child))
                replaced.append(name)
            else:
                visit(child, name + ".")

    visit(model, "")
    return replaced
