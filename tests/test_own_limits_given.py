"""Samples' own limits as users give them: what is refused, and objects that hold tensors."""

import copy
import pickle

import pytest
import torch
from helpers_limits import ATOL, MOST, RTOL, B, N, account, inputs, sine, solve

from fpi_cuda import FixedPointLayer, ImplicitAdjoint, Picard, Tolerance, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")

# --- what is refused --------------------------------------------------------------------------

WRONG = [
    ("rtol", torch.ones(B - 1), ValueError, r"rtol must have one value for each of the 6 samples"),
    ("rtol", torch.ones(B, 1), ValueError, r"rtol must have one value a sample"),
    ("atol", -RTOL, ValueError, r"atol must be finite and >= 0 \(got -0.5 for sample 0\)"),
    ("rtol", RTOL / 0, ValueError, r"rtol must be finite and >= 0 \(got inf for sample 0\)"),
    ("rtol", RTOL * torch.nan, ValueError, r"rtol must be finite and >= 0 \(got nan"),
    ("rtol", torch.tensor(-1.0), ValueError, "rtol must be a finite number >= 0 .got -1.0"),
    ("rtol", RTOL.tolist(), ValueError, r"rtol must be a finite number .*a tensor \[B\] has one"),
    ("atol", ATOL.numpy(), ValueError, r"atol must be a finite number .*a tensor \[B\] has one"),
    ("rtol", MOST, TypeError, "rtol must be a tensor of a floating dtype .got one of torch.int64"),
    ("most", RTOL, TypeError, "max_iterations must be a tensor of whole numbers .got one of"),
    ("most", MOST > 0, TypeError, "max_iterations must be a tensor of whole numbers"),
    ("most", MOST - 1, ValueError, r"max_iterations must be from 1 .*got 0 for sample 5"),
    ("most", MOST + 2**24, ValueError, "max_iterations must be from 1 to 16777216"),
    ("most", MOST[:2], ValueError, "max_iterations must have one value for each of the 6 samples"),
    ("most", MOST.to("meta"), ValueError, "must be a dense tensor .* .got one on the meta device"),
    ("rtol", RTOL.to_sparse(), ValueError, "must be a dense tensor .* .got one of layout"),
    ("most", torch.tensor(0), ValueError, "max_iterations must be a whole number >= 1"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG)
@pytest.mark.parametrize("backward", [False, True])
def test_what_is_not_one_good_value_a_sample_is_refused(name, value, error, message, backward):
    """The adjoint's at the forward already."""
    good = {"tolerance": Tolerance(1e-3), "max_iterations": 50}
    if backward and name == "most" and isinstance(value, torch.Tensor) and not value.dim():
        value = value - 1  # zero is no iteration there
        message = "max_iterations must be a whole number >= 0"

    def of():
        if name == "most":
            return good | {"max_iterations": value}
        return good | {"tolerance": Tolerance(**{name: value})}

    with pytest.raises(error, match=message):
        if backward:
            fixed_point(sine, inputs(), inputs(), adjoint=ImplicitAdjoint(**of()))
        else:
            fixed_point(sine, inputs(), inputs(), **of())


def test_an_empty_batch_has_none():
    z = inputs(b=0)
    s = solve(z, RTOL[:0], ATOL[:0], MOST[:0])
    assert account(s, z)[0].shape == (0, N)


# --- as objects -------------------------------------------------------------------------------


def test_objects_with_tensors_are_values():
    made = [
        (Tolerance(RTOL, 0.0), Tolerance(RTOL.clone(), 0.0), Tolerance(RTOL * 2, 0.0)),
        (
            ImplicitAdjoint(Picard(), Tolerance(RTOL), MOST),
            ImplicitAdjoint(Picard(), Tolerance(RTOL.clone()), MOST.clone()),
            ImplicitAdjoint(Picard(), Tolerance(RTOL), MOST + 1),
        ),
    ]
    for one, like, other in made:
        assert one == like and hash(one) == hash(like)
        assert one != other and one != type(one)() and one != "one"
        for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert copied == one and hash(copied) == hash(one)
        before = hash(one)
        tensor = one.rtol if isinstance(one, Tolerance) else one.max_iterations
        kept, found = tensor.clone(), {one: 1}
        tensor.zero_()
        assert hash(one) == before and one in found
        tensor.copy_(kept)
    assert "tensor([" in repr(Tolerance(RTOL))
    leaf = RTOL.clone().requires_grad_() * 2
    copy.deepcopy(Tolerance(leaf))  # autograd's part in it is left behind


def test_a_layer_with_them_is_copied_and_pickled():
    own = {"tolerance": Tolerance(RTOL, ATOL), "max_iterations": MOST, "on_failure": "return"}
    layer, z = FixedPointLayer(sine, **own), inputs()
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(each(z), solve(z).x)


def test_a_layers_grow_in_eval_mode_too():
    own = {"tolerance": Tolerance(RTOL, ATOL), "max_iterations": MOST, "on_failure": "return"}
    layer, z = FixedPointLayer(sine, **own, eval_factor=2.5).eval(), inputs()
    x, most = layer(z), torch.tensor([150, 150, 150, 10, 8, 3])
    assert torch.equal(x, solve(z, RTOL / 2.5, ATOL / 2.5, most).x)
    given = layer(z, tolerance=Tolerance(RTOL, ATOL), max_iterations=MOST)
    assert torch.equal(given, solve(z).x)


def test_a_layers_grow_in_eval_mode_as_numbers_do():
    """In narrow dtypes too: no limit overflows, and no tolerance becomes a fixed count."""
    narrow = (torch.full((B,), 2.0**-10).half(), torch.full((B,), 100, dtype=torch.uint8))
    found = []
    for rtol, most in (narrow, (2.0**-10, narrow[1][0]), (2.0**-10, 100)):
        own = {"tolerance": Tolerance(rtol, 0.0), "max_iterations": most, "on_failure": "return"}
        layer = FixedPointLayer(sine, solver=Picard(0.04), **own, eval_factor=3).eval()
        layer(inputs())
        found.append(layer.last.iterations.tolist())
        layer.eval_factor, layer.max_iterations, layer.solver = 2.0**15, 1, Picard()
        layer(inputs())
        found[-1] += layer.last.status.tolist()
    assert found[0] == found[1] == found[2]
    assert max(found[0]) > 100


def test_values_are_read_at_each_call():
    z, most = inputs(), MOST.clone()
    tolerance = Tolerance(RTOL.clone(), 0.0)
    for change in (lambda: None, lambda: most.add_(1), lambda: tolerance.rtol.mul_(0.1)):
        change()
        found = fixed_point(
            sine, z * 0, z, tolerance=tolerance, max_iterations=most, on_failure="return"
        )
        expected = solve(z, tolerance.rtol.clone(), 0.0, most.clone())
        assert torch.equal(found.iterations, expected.iterations)


def test_compiled_code_may_make_them():
    @torch.compile(backend="eager")
    def compiled(z, rtol, most):
        return solve(z, rtol, ATOL, most).x * 2

    for most in (MOST, MOST + 1):
        assert torch.equal(compiled(inputs(), RTOL, most), 2 * solve(inputs(), most=most).x)
