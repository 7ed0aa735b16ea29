"""Why a step may not call what is no operation of a graph, and what there is instead."""

from __future__ import annotations

from ostinato.own.graph import COMPARISONS, LOGICAL, TAKES

_WRITTEN = ("add", "sub", "mul", "div", "neg", "pow", *COMPARISONS, *LOGICAL)
ELEMENTWISE = "a step is arithmetic on each element: + - * / **, comparisons, " + ", ".join(
    name for name in TAKES if name not in _WRITTEN
)
_REASONS: dict[str, tuple[str, str]] = {}


def _enter(reason: str, instead: str, names: str) -> None:
    _REASONS.update(dict.fromkeys(names.split(), (reason, instead)))


_enter(
    "it changes the gradient, which a graph has from its operations",
    "the value itself; engine = False runs the step as it is written",
    "detach data requires_grad_ no_grad stop_gradient register_hook retain_grad backward grad",
)
_enter(
    "a random number would be the same in each call",
    "a drive: drives = 1, and numbers that the caller draws",
    "rand_like randn_like randint_like bernoulli dropout alpha_dropout feature_alpha_dropout"
    " feature_dropout dropout1d dropout2d dropout3d empty_like normal poisson multinomial rrelu"
    " gumbel_softmax",
)
_enter(
    "a sum over units, rows or gates",
    "the products with weight_ih and weight_hh, which a step is given in x and h",
    "sum mean prod amin amax argmin argmax norm std var cumsum cumprod cummax cummin logsumexp"
    " softmax log_softmax softmin layer_norm group_norm rms_norm batch_norm instance_norm normalize"
    " any all median mode sort topk dot vdot outer cosine_similarity logcumsumexp nansum dist"
    " glu aminmax count_nonzero local_response_norm",
)
_enter(
    "a matrix product",
    "more gates: a class's x_gates and h_gates say how many products with weights there are",
    "matmul mm bmm mv linear addmm addmv baddbmm bilinear einsum tensordot conv1d conv2d addbmm"
    " chain_matmul kron embedding scaled_dot_product_attention",
)
_enter(
    "each value is (B, H), and a step computes each element for itself",
    "x[g], h[g] and state[k], which come apart already, and several states",
    "reshape view view_as reshape_as transpose permute t T mT swapaxes flatten unflatten squeeze"
    " unsqueeze expand expand_as repeat tile broadcast_to cat concat concatenate stack hstack"
    " vstack dstack chunk split tensor_split split_with_sizes unbind narrow select index_select"
    " gather scatter take take_along_dim roll flip movedim pad getitem setitem index_put"
    " masked_select nonzero shape size ndim dim numel nelement stride unfold tril triu diag"
    " broadcast_tensors meshgrid new_zeros new_ones new_full new_empty new_tensor"
    " repeat_interleave",
)
_enter(
    "values stay in the layer's dtype and on its device",
    "the value itself; mask.float() or mask.to(h.dtype) makes 1 and 0 of a mask",
    "to double half bfloat16 int long short byte bool char cuda cpu type astype device is_cuda"
    " layout requires_grad is_leaf grad_fn",
)
_enter(
    "a step has no numbers yet when it is recorded",
    "torch's functions on the value as a whole",
    "item tolist numpy __array__ allclose equal isclose is_nonzero",
)
_enter("powers are by integers", "torch.exp(x * math.log(2))", "exp2 float_power ldexp")
_enter("it is not recorded", "torch.exp(x) - 1", "expm1")
_enter("it is not recorded", "torch.log(x + 1)", "log1p")
_enter("it is not recorded", "torch.log(x) / math.log(2), or of 10", "log2 log10")
_enter(
    "it is not recorded",
    "torch.maximum(a, b) + softplus(-abs(a - b))",
    "logaddexp logaddexp2",
)
_enter(
    "it is not recorded",
    "torch.where(x > 0, x, a * (torch.exp(x) - 1))",
    "elu selu celu",
)
_enter(
    "its derivative is zero, or jumps",
    "a comparison with torch.where",
    "floor ceil round trunc frac fix floor_divide remainder fmod heaviside",
)


def reason_of(name: str) -> tuple[str, str]:
    """Return why a function of torch is refused, and what there is instead.

    Args:
        name: the function's or method's name.

    Returns:
        A reason, and advice.

    Example:
        >>> reason_of("matmul")[0], reason_of("relu_")[0]
        ('a matrix product', 'an in-place operation')
    """
    if name in _REASONS:
        return _REASONS[name]
    is_assignment = name in ("iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior")
    if is_assignment or (name.endswith("_") and not name.endswith("__")):
        return "an in-place operation", "a new value: a = a + b"
    return "it is not recorded", ELEMENTWISE
