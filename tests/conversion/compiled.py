"""Compile models of transformers whole, with this toolkit's experts, and print what differs as JSON."""

from __future__ import annotations

import json

import torch

from gatewright.conversion import register_experts, use_in_transformers
from gatewright.kernels import runnable_backends
from tests.conversion.families import experts_of, furthest, inputs, outcome, results, whole_model

# gpt-oss: its own gate between operators of ours, or, where a backend is named, copies of its weights.
ALONE = (("mixtral", "MixtralExperts"), ("gpt_oss", "GptOssExperts"))
# The reference is a Python loop over experts: compiled, it is nothing but long.
COMPILED = (None, *(backend for backend in runnable_backends() if backend != "reference"))


def whole(family: str) -> tuple[float, str]:
    """Return by how much a compiled model differs from its eager loop, and where."""
    model = whole_model(family)
    expected = outcome(model)
    use_in_transformers(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): value for name, value in outcome(compiled).items()}
    return furthest(found, expected)


def alone(family: str, name: str, backend: str | None) -> tuple[float, str]:
    """Return by how much compiled experts differ from their eager loop, and where."""
    experts = experts_of(family, name)
    expected = results(experts, *inputs())
    experts.config._experts_implementation = "gatewright" if backend is None else f"gatewright_{backend}"
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    return furthest(results(compiled, *inputs()), expected)


def main() -> None:
    """Print {case: what differs}; everything is compiled whole, without a break."""
    register_experts()
    cases = {f"all of {family}": (whole, family) for family in ("mixtral", "gpt_oss")}
    for experts in ALONE:
        cases |= {f"{experts[1]} {backend}": (alone, *experts, backend) for backend in COMPILED}
    found = {}
    for case, (function, *given) in cases.items():
        torch._dynamo.reset()
        try:
            error, name = function(*given)
        except Exception as problem:
            error, name = float("inf"), f"{type(problem).__name__}: {str(problem)[:1500]}"
        if not error < 1e-5:
            found[case] = f"{name}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
