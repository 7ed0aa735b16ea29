"""ostinato.levels beside torch's own way with a Function under torch.func."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from ostinato import levels, nn


class _Cube(torch.autograd.Function):
    """x ** 3 and, without a gradient, x * 0: a rule for each transform."""

    @staticmethod
    def forward(factor, x):
        return factor * x**3, x * 0

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor, x = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, dy, _):
        (x,) = ctx.saved_tensors
        return None, 3 * ctx.factor * x**2 * dy

    @staticmethod
    def jvp(ctx, _, move):
        (x,) = ctx.saved_tensors
        return 3 * ctx.factor * x**2 * move, None

    @staticmethod
    def vmap(info, in_dims, factor, x):
        assert info.batch_size == x.shape[in_dims[1]]
        cube, zero = levels.apply(_Cube, factor, x)
        return (cube, zero), (in_dims[1], in_dims[1])


def ours(x):
    return levels.apply(_Cube, 2.0, x)[0]


def torchs(x):
    return _Cube.apply(2.0, x)[0]


TRANSFORMS = {
    "none": lambda f: f,
    "grad": lambda f: grad(lambda x: f(x).sum()),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "vmap": lambda f: vmap(f, in_dims=1, out_dims=1),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).sum())),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(x).sum()),
    "vmap of another": lambda f: lambda x: vmap(lambda y: f(x) + y)(x),
    "vmap of vmap": lambda f: vmap(vmap(f), in_dims=1),
    "vmap of jvp": lambda f: vmap(lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]),
    "grad of grad": lambda f: grad(lambda x: grad(lambda y: f(y).sum())(x).square().sum()),
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (x,))[1].sum()),
    "no_grad in grad": lambda f: grad(lambda x: (x * torch.no_grad()(f)(x)).sum()),
    "grad in no_grad": lambda f: torch.no_grad()(grad(lambda x: f(x).sum())),
}


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_function_is_transformed_as_by_torch(name):
    x = torch.randn(3, 4, dtype=torch.float64)
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(ours)(x), transform(torchs)(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["none", "grad", "vmap", "vmap of grad", "jacrev"])
def test_gradients_below_the_transforms_go_on(name):
    found = []
    for function in (ours, torchs):
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
        TRANSFORMS[name](function)(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_an_error_leaves_the_transforms_as_they_were():
    class Wrong(_Cube):
        @staticmethod
        def forward(factor, x):
            raise ValueError("wrong")

        @staticmethod
        def vmap(info, in_dims, factor, x):
            raise ValueError("wrong")

    def twice(x):
        with pytest.raises(ValueError, match="wrong"):
            levels.apply(Wrong, 2.0, x)
        return ours(x)

    x = torch.randn(3, 4, dtype=torch.float64)
    for transform in (jacrev, vmap):
        assert torch.equal(transform(twice)(x), transform(torchs)(x))
    assert not torch._C._functorch.get_single_level_autograd_function_allowed()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer", [nn.GRUCell(4, 5), nn.GRU(4, 5), nn.RNNCell(4, 5)])
def test_a_layer_takes_what_an_ended_transform_left_behind(layer, training):
    left = []

    def keep(x):
        left.append(x)
        return x.sum()

    x = torch.randn(3, 4)
    vjp(keep, x)
    assert torch._C._functorch.is_gradtrackingtensor(left[0])
    with torch.set_grad_enabled(training):
        found, expected = layer(left[0]), layer(x)
        if isinstance(found, tuple):
            found, expected = found[0], expected[0]
        assert torch.equal(found, expected)
        if training:
            found.sum().backward()
