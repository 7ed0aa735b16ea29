"""RNN, GRU and LSTM: whole sequences in layers and directions.

Legend: T steps, B batch, N packed rows, I input_size, H hidden_size, O size of an output
(proj_size, or H), L layers, D directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ostinato.call import States
from ostinato.nn._arguments import state_pair
from ostinato.nn._shared import Layers


class RNN(Layers):
    """Elman RNN over whole sequences, in layers and directions.

    h_t = phi(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), phi being tanh or relu (docs/math.md, 2).

    Args:
        input_size: I, features of an input step.
        hidden_size: H, features of a state.
        num_layers: L; each layer after the first reads the output of the one before it.
        nonlinearity: "tanh" or "relu".
        bias: whether b_ih and b_hh exist.
        batch_first: whether batched input and output are (B, T, features); states never are.
        dropout: probability of zeroing an element of each layer's output but the last, in training.
        bidirectional: whether a second direction runs from the end; D is then 2.
        device: where parameters are created.
        dtype: of the parameters.
        memory: "keep", or "recompute" to keep no gates for backward, which then computes them
            again: the same gradients bit for bit, in about 4/3 of the time.

    `forward` says what it takes and returns.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: a size, dropout or nonlinearity out of range.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> rnn = nn.RNN(10, 20, 2, nonlinearity="relu")
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))

    Source: Elman 1990, doi:10.1207/s15516709cog1402_1, with torch's two biases.
    """

    _kind = "RNN"
    nonlinearity: str

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            *,
            device: Any = None,
            dtype: Any = None,
            memory: str = "keep",
        ) -> None: ...

    else:

        def __init__(self, *args, **kwargs):
            if len(args) > 3:
                input_size, hidden_size, num_layers, nonlinearity, *rest = args
                args = input_size, hidden_size, num_layers, *rest
            else:
                nonlinearity = kwargs.pop("nonlinearity", "tanh")
            _reject_projection(args, kwargs)
            if nonlinearity not in ("tanh", "relu"):
                raise ValueError(
                    f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
                )
            super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)
            self.nonlinearity = nonlinearity


class GRU(Layers):
    """Gated recurrent unit over whole sequences, in layers and directions.

    r = sigmoid(W_ir x_t + b_ir + W_hr h + b_hr), z likewise,
    n = tanh(W_in x_t + b_in + r * (W_hn h + b_hn)), h_t = (1 - z) * n + z * h with h = h_(t-1)
    (docs/math.md, 7-10). r multiplies after the product with W_hn: ONNX `linear_before_reset=1`,
    Keras `reset_after=True`.

    Args:
        input_size: I, features of an input step.
        hidden_size: H, features of a state.
        num_layers: L; each layer after the first reads the output of the one before it.
        bias: whether b_ih and b_hh exist.
        batch_first: whether batched input and output are (B, T, features); states never are.
        dropout: probability of zeroing an element of each layer's output but the last, in training.
        bidirectional: whether a second direction runs from the end; D is then 2.
        device: where parameters are created.
        dtype: of the parameters.
        memory: "keep", or "recompute" to keep no gates for backward, which then computes them
            again: the same gradients bit for bit, in about 4/3 of the time.

    `forward` says what it takes and returns.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: a size or dropout out of range.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> gru = nn.GRU(10, 20, bidirectional=True)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
        >>> forward, backward = output.view(5, 3, 2, 20).unbind(2)
        >>> torch.equal(h_n[0], forward[-1]), torch.equal(h_n[1], backward[0])
        (True, True)

    Source: Cho et al. 2014, arXiv:1406.1078v1, reset after the matrix product as in cuDNN.
    """

    _kind = "GRU"

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            *,
            device: Any = None,
            dtype: Any = None,
            memory: str = "keep",
        ) -> None: ...

    else:

        def __init__(self, *args, **kwargs):
            _reject_projection(args, kwargs)
            super().__init__("GRU", *args, **kwargs)


class LSTM(Layers):
    """Long short-term memory over whole sequences, in layers and directions, with projection.

    i, f, o = sigmoid(W_i x_t + b_i + W_h h + b_h), g = tanh(likewise), c_t = f * c + i * g,
    h_t = o * tanh(c_t), then W_hr h_t with proj_size, where h = h_(t-1) and c = c_(t-1)
    (docs/math.md, 16-22).

    Args:
        input_size: I, features of an input step.
        hidden_size: H, features of a cell state.
        num_layers: L; each layer after the first reads the output of the one before it.
        bias: whether b_ih and b_hh exist.
        batch_first: whether batched input and output are (B, T, features); states never are.
        dropout: probability of zeroing an element of each layer's output but the last, in training.
        bidirectional: whether a second direction runs from the end; D is then 2.
        proj_size: features of a projected state, less than H; 0 means no projection. O is
            proj_size, or H without.
        device: where parameters are created.
        dtype: of the parameters.
        memory: "keep", or "recompute" to keep no gates for backward, which then computes them
            again: the same gradients bit for bit, in about 4/3 of the time.

    `forward` says what it takes and returns.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: a size or dropout out of range.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> lstm = nn.LSTM(10, 20, num_layers=2, proj_size=7)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 7]), torch.Size([2, 3, 7]), torch.Size([2, 3, 20]))

    Source: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, with the forget gate of
    Gers et al. 2000 and without peepholes; projection: Sak et al. 2014, arXiv:1402.1128.
    """

    _kind = "LSTM"

    # Callers of these know two states: torch's own, as it is for the other layers by inheritance.
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            proj_size: int = 0,
            device: Any = None,
            dtype: Any = None,
            *,
            memory: str = "keep",
        ) -> None: ...

    else:

        def __init__(self, *args, **kwargs):
            super().__init__("LSTM", *args, **kwargs)

    def _states(self, hx: Any) -> States | None:
        return state_pair(self._kind, hx)

    def _result(self, output: Any, last: States, every: States) -> Any:
        return (output, last, every) if every else (output, last)

    def _reject_size(self, index: int, expected: tuple[int, int, int], got: Tensor) -> NoReturn:
        raise RuntimeError(f"Expected hidden[{index}] size {expected}, got {list(got.shape)}")


def _reject_projection(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse proj_size, which RNNBase takes by name and as the eighth of its arguments."""
    *_, proj_size = (*args, *[0] * 8)[:8]
    if "proj_size" in kwargs or proj_size != 0:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
