"""What the ranks of the test of separate documents run."""

from tests.parallel.parity_cases import run_case


def run_separated(cases: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Errors of each case against documents that are run one at a time."""
    results = {}
    for name, case in cases.items():
        results[name] = run_case(**case | {"data": {"separate_documents": True}})
    return results
