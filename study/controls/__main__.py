"""The rule of docs/claim.md, applied to the cells of its arms.

    python -m study.controls --results study/results

study.compare computes the cells, by the commands of study/README.md.
"""
from pathlib import Path
from statistics import mean

from study.common import Cells, digest, matching, parser
from study.compare import FIELDS, interval, sign_flip_p
from util.cli import UserError

HOT = {"preset": "tiny", "bnr": 0.}
WARM = {"preset": "tiny", "bnr": 0.5}
ARMS = {
    "reweighted": {**HOT, "parts": "reweighted"},
    "higher levels": {**HOT, "P_mean": -0.9},
    "lower levels": {**HOT, "P_mean": -1.5},
    "blurred input": {**HOT, "parts": "blurred_input"},
    "split targets": {**HOT, "parts": "split_targets"},
}
LOWER_WARM = {**ARMS["lower levels"], "bnr": 0.5}
RATES = {"2e-3": HOT, "1e-3": {**HOT, "lr": 0.001}, "4e-3": {**HOT, "lr": 0.004}}
KIMG = 120
PAIRS = 6                                       # of the plan: fewer have no verdict


def distances(cells: list, network: dict) -> dict:
    """{seed: distance} at 120 kimg, of networks whose parts are those of today."""
    code = None
    if "parts" in network:
        code = digest(Path(__file__).with_name(f"{network['parts']}.py"))
    cells = matching(cells, kind="samples", network=network, code=code, kimg=KIMG,
                     solver="multistep", nfe=18, samples=5000)
    return {cell["seed"]: cell["distance"] for cell in cells}


def best_rate(cells: list) -> dict:
    """{its name: its distances}: the one of three learning rates with the lowest mean; none before
    all have their networks."""
    rates = {name: distances(cells, network) for name, network in RATES.items()}
    if min(map(len, rates.values())) < PAIRS:
        return {}
    best = min(rates, key=lambda name: mean(rates[name].values()))
    return {f"learning rate {best}": rates[best]}


def less(one: dict, other: dict) -> list:
    """one - other for each seed that has both."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def side(differences: list) -> str:
    """Where the 95 % interval of the mean lies: below 0, above 0, or "contains 0"."""
    middle, half = interval(differences)
    if middle + half < 0:
        return "below 0"
    if middle - half > 0:
        return "above 0"
    return "contains 0"


def verdict(gain: list, lead: list, whole: list) -> str:
    """The rule of docs/claim.md. gain: the arm less hot; lead: warm less the arm; whole: warm less
    hot; each a difference a seed."""
    if min(len(gain), len(lead), len(whole)) < PAIRS:
        return f"none before {PAIRS} pairs"
    if side(whole) != "below 0":
        return "nothing to explain"
    if side(gain) == "below 0":
        if side(lead) == "above 0":
            return "better than warm"
        if side(lead) == "below 0":
            return f"explains a part, {mean(gain) / mean(whole):.0%}"
        return "explains it"
    if side(lead) == "below 0":
        if side(gain) == "above 0":
            return "worse than hot"
        return "does not explain it"
    return "undecided"


def with_interval(differences: list) -> str:
    """The mean difference and its 95 % interval, in words."""
    middle, half = interval(differences)
    return f"{middle:+.1f} +- {half:.1f}"


def row(name: str, gain: list, lead: list, result: str) -> str:
    entries = [name, str(len(gain))]
    for differences in (gain, lead):
        entries += [with_interval(differences), f"{sign_flip_p(differences):.3g}"]
    return "| " + " | ".join([*entries, result]) + " |"


def table(cells: list) -> None:
    hot = distances(cells, HOT)
    warm = distances(cells, WARM)
    whole = less(warm, hot)
    print("| arm | pairs | arm - hot | p | warm - arm | p | by the rule |")
    print("|---|---|---|---|---|---|---|")
    if len(whole) < 2:
        return
    arms = {name: distances(cells, network) for name, network in ARMS.items()}
    arms.update(best_rate(cells))
    for name, arm in arms.items():
        gain = less(arm, hot)
        lead = less(warm, arm)
        if len(gain) > 1 and len(lead) > 1:
            print(row(name, gain, lead, verdict(gain, lead, whole)))
    print()
    print_pairs("warm - hot", warm, hot)
    print_pairs("warm - hot at P_mean -1.5", distances(cells, LOWER_WARM), arms["lower levels"])


def print_pairs(name: str, warm: dict, hot: dict) -> None:
    seeds = sorted(warm.keys() & hot.keys())
    if len(seeds) > 1:
        differences = less(warm, hot)
        print(f"{name}: {with_interval(differences)}, p {sign_flip_p(differences):.3g}, "
              f"{len(seeds)} pairs; means: hot {mean(hot[seed] for seed in seeds):.1f}, "
              f"warm {mean(warm[seed] for seed in seeds):.1f}")


def main():
    p = parser("controls", "The rule of docs/claim.md, applied to the cells of its arms.")
    args = p.parse_args()
    args.plot_only = False                      # or a file that is missing asks to leave that out
    with p.one_line_errors():
        cells = Cells(args, "controls", FIELDS)
        if not cells.cells:
            raise UserError(f"{cells.file} has no cells yet: study/README.md has the commands that "
                            "compute them")
        table(cells.cells)


if __name__ == "__main__":
    main()
