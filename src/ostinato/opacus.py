"""Differentially private training with Opacus: how it gets a layer's gradient for each sample."""

from __future__ import annotations

from typing import Any

from ostinato.cells import LAYERS

_DROPOUT = (
    "dropout: expected 0 between the layers, since gradients of each sample are those of a second "
    "run, which would draw other masks; put torch.nn.Dropout between layers of their own"
)


def register() -> None:
    """Tell Opacus how RNN, GRU and LSTM give a gradient for each sample.

    Opacus asks a function for each type of module. Without this one it would take a layer's output,
    which is a tuple, for a tensor. The gradients come from vmap(grad) on the engine (ostinato's
    own rules, see docs/derivatives.md). To register twice does no harm.

    Opacus hands over the input and the gradient of the first result alone. So let the loss depend
    on `output` (`output[:, -1]` rather than `h_n[-1]`), and give nothing by keyword: what Opacus
    does not see is missing from the gradients. RNN and GRU may have `hx` as the second argument
    where batch_first is False: Opacus looks for rows in the same dimension of every argument.
    Dropout between layers is refused: the gradients are those of a second run, which would draw
    other masks. So are packed rows, of which Opacus cannot tell one sample from another. A loss of
    h_n alone ends in Opacus itself: "'NoneType' object has no attribute 'detach'".

    Raises:
        ImportError: Opacus is not installed.

    Example:
        >>> import pytest
        >>> import torch
        >>> opacus = pytest.importorskip("opacus")
        >>> import ostinato.opacus
        >>> ostinato.opacus.register()
        >>> layer = opacus.GradSampleModule(ostinato.nn.GRU(3, 4, batch_first=True))
        >>> layer(torch.randn(5, 7, 3, requires_grad=True))[0].sum().backward()
        >>> layer._module.weight_hh_l0.grad_sample.shape
        torch.Size([5, 12, 4])

    Source: Yousefpour et al. 2021, arXiv:2109.12298.
    """
    from opacus.grad_sample import register_grad_sampler
    from opacus.validators import register_module_validator

    from ostinato import nn

    layers = [getattr(nn, cell.layer) for cell in LAYERS.values()]
    register_grad_sampler(layers)(_gradients_of_samples)
    register_module_validator(layers)(_errors_of)


def _errors_of(module: Any) -> list[Exception]:
    """Return what Opacus' validator, which make_private asks, is to say of a layer."""
    from opacus.validators.errors import UnsupportedModuleError

    return [UnsupportedModuleError(_DROPOUT)] if module.dropout and module.num_layers > 1 else []


def _gradients_of_samples(module: Any, activations: list[Any], backprops: Any) -> dict[Any, Any]:
    """Return a gradient per sample, (B, *its shape), for each parameter that requires one.

    `activations` are what forward was given: input, (B, T, I), and perhaps hx; `backprops` is the
    gradient of output, (B, T, D * H).
    """
    import torch

    # Opacus has brought the batch to the front if it was told that it is second.
    for hook in module._backward_hooks.values():
        told = getattr(hook, "keywords", {}).get("batch_first", module.batch_first)
        if told != module.batch_first:
            raise ValueError(
                f"batch_first: expected the same for the layer and Opacus, got "
                f"{module.batch_first} and {told}"
            )
    if module.dropout and module.num_layers > 1 and module.training:
        raise ValueError(_DROPOUT)
    input, *states = activations
    if input.dim() != 3:
        raise ValueError(
            "input: expected a padded batch of 3 dimensions, whose rows are the samples, got "
            f"{input.dim()}; Opacus takes no PackedSequence and no single sequence here"
        )
    if states and module.batch_first:
        raise ValueError("hx: expected None with batch_first, since its rows are not first")
    # Past the module's __call__, whose hooks are Opacus' own.
    layer = torch.nn.Module()
    layer.inner = module
    layer.forward = lambda *arguments: module.forward(*arguments)[0]
    parameters = {f"inner.{n}": p for n, p in module.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Any], backprop: Any, *arguments: Any) -> Any:
        return (torch.func.functional_call(layer, parameters, arguments) * backprop).sum()

    dims = None, *[0] * (2 + len(states))
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=dims)
    found = gradients(parameters, backprops, input.to(backprops.dtype), *states)
    return {parameter: found[name] for name, parameter in parameters.items()}
