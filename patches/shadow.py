"""Replaced `forward`s of modules, for as long as one call lasts, also where torch.compile is at work.

Code that torch.compile has made may be deaf to what it is told by options: ComfyUI's compile node drops every guard on
them. So whatever we tell a module by options goes to it `uncompiled`, and the replacements themselves are no part of
what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

# Of comfy_api.torch_helpers, which is not in every tree.
COMPILE_KEY = "torch.compile"


@torch.compiler.disable
def uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)` as written, even if it or something in it is compiled."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None:  # Before torch 2.6 only what is compiled itself can be undone.
        return getattr(function, "_torchdynamo_orig_callable", function)(*args, **kwargs)
    with set_stance("force_eager"):
        return function(*args, **kwargs)


def is_rewritten(module: torch.nn.Module) -> bool:
    """Whether another pack has put a `forward` of its own over the module's; torch.compile's does not count."""
    return "forward" in vars(inner(module))


def is_compiled(
    model: torch.nn.Module, blocks: Iterable[torch.nn.Module], options: Mapping[str, Any]
) -> bool:
    """Whether torch.compile is at work in a forward of `model` with these blocks.

    ComfyUI's and KJNodes' nodes exchange modules within APPLY_MODEL, maybe behind our back: their wrapper tells.
    """
    return COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}) or any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in (model, *blocks)
    )


def inner(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself where torch.compile has wrapped it."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def shadowed(replacements: Iterable[tuple[torch.nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Bind `replacement(original, *args, **kwargs)` over each module's forward; restore what was there.

    The module is shadowed, not its class, and whatever another pack put there is the `original`.
    """
    before = []
    try:
        for module, replacement in replacements:
            before.append((module, vars(module).get("forward")))
            module.forward = partial(replacement, module.forward)
        yield
    finally:
        for module, foreign in reversed(before):
            if foreign is None:
                vars(module).pop("forward", None)
            else:
                module.forward = foreign
