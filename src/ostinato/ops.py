"""The layers as functions of tensors, and the operators `ostinato::layer` and its gradient.

Importing this registers the operators, for who loads a program that holds them.
"""

from ostinato.route import cut_layer, layer

__all__ = ["cut_layer", "layer"]
