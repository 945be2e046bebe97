"""Does hostile or odd input ever end in an undocumented error or a wrong count?

Runs the checks of `tests/conformance/test_hostile.py` on many more generated cases,
new ones for every seed. A case that fails stops the run and is printed, shrunk.
"""

import collections
import time

import hypothesis
import jax

from benchmarks.parts import common
from tests.conformance import hostile

# by kind, of the whole run; a case of the second kind traces a whole update
SHARES = dict(zip(hostile.KINDS, (0.4, 0.05, 0.15, 0.2, 0.2), strict=True))


def run(name: str, num_cases: int, seed: int) -> dict:
    """All cases of one kind."""
    make, check = hostile.KINDS[name]
    results = collections.Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(make())
    def check_all(case):
        results[check(case)] += 1

    begin = time.process_time()
    check_all()
    return {
        "kind": name,
        "cases": results.total(),
        "accepted": results["accepted"],
        "refused": results["refused"],
        "failed": 0,  # or the run would have stopped
        "cpu_s": time.process_time() - begin,
    }


def main() -> None:
    args = common.parse_args(__doc__, repeats=22_000, quick_repeats=100)
    jax.config.update("jax_traceback_filtering", "off")  # whose error it was
    rows = []
    for seed, (name, share) in enumerate(SHARES.items()):
        rows.append(run(name, round(share * args.repeats), seed))
        print(rows[-1], flush=True)
    common.print_table(rows)
    common.write_json(args.json, common.environment(cases=args.repeats), rows)


if __name__ == "__main__":
    main()
