"""The optimisers are torch's, step by step, and leave its compiler where it is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bayespot import optimisers


def minimised(optimiser_class, options, again: bool) -> torch.Tensor:
    """Rosenbrock's valley, 20 steps; the state is saved and read back half-way on request."""
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimiser = optimiser_class([x], **options)

    def closure():
        optimiser.zero_grad()
        value = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        value.backward()
        return value

    for i in range(20):
        if again and i == 10:
            state = optimiser.state_dict()
            optimiser = optimiser_class([x], **options)
            optimiser.load_state_dict(state)
        optimiser.step(closure)
    return x.detach()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [("Adam", {"lr": 0.05, "betas": (0.9, 0.99)}), ("LBFGS", {"max_iter": 10, "line_search_fn": "strong_wolfe"})],
)
def test_steps_are_those_of_torch(name, options, again):
    """To the last bit, and the parameters need gradients afterwards."""
    ours = minimised(getattr(optimisers, name), options, again)
    assert torch.equal(ours, minimised(getattr(torch.optim, name), options, again))
    assert float((ours - 1).abs().max()) < (2.3 if name == "Adam" else 1e-3)


def test_the_compiler_is_not_imported():
    code = (
        "import sys, torch\n"
        "from bayespot.optimisers import Adam, LBFGS\n"
        "x = torch.zeros(2, requires_grad=True)\n"
        "for one in (Adam([x]), LBFGS([x])):\n"
        "    one.zero_grad()\n"
        "    one.step(lambda: (x - 1).pow(2).sum())\n"
        "    one.load_state_dict(one.state_dict())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "torch.optim.Adam([x])\n"
        "assert 'torch._dynamo' in sys.modules, 'torch no longer imports it: use torch.optim itself'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
