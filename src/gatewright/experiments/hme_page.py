"""Page and picture of hme/table1, from its record and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gatewright.experiments.pages import measured_with
from gatewright.inspection.plots.learning import draw_learning

Record = dict[str, Any]

WHAT = {
    "linear": "least squares",
    "back-propagation": "60 logistic hidden units, batch descent, step {net_rate:g} over the number of cases",
    "exact EM": "16 experts, four binary levels, algorithm 1: gates by IRLS",
    "least-squares EM": "the same, algorithm 2: gates by least squares on ln h",
    "on-line": "the same, recursive least squares, a case at a time (2.27 to 2.32)",
    "gradient": "the same, a gradient step per case (2.17), step {gradient_rate:g}, variance "
    "{gradient_variance:g}",
    "CART": "scikit-learn's DecisionTreeRegressor, one tree per output",
}


def hme_page(record: Record) -> str:
    """Return the page: claim, verdict, every system beside the paper with every seed."""
    plan, quick = record["plan"], record["quick"]
    rows = [
        _row(name, own["summary"], record["paper"][name], plan) for name, own in record["systems"].items()
    ]
    head = ["system, ours (paper's)", "what", "relative error", "SD", "epochs", "least error by seed"]
    head += ["epochs by seed", "error at the end", "CPU seconds per run"]
    cart = record["systems"]["CART"]["runs"][0]
    seconds = sum(run["cpu_seconds"] for own in record["systems"].values() for run in own["runs"])
    em = plan["em"]
    lines = [
        "# Table 1 of Hierarchical Mixtures of Experts and the EM Algorithm (1994)",
        "",
        f"Command: `gatewright reproduce {record['target']}{' --quick' if quick else ''}`. Claim: "
        f"{record['claim']}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        f"![relative error by epoch, a line per seed](hme-table1{'-quick' if quick else ''}-learning.png)",
        "",
        "| " + " | ".join(head) + " |",
        "|---|---" + "|--:" * (len(head) - 2) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"The arm of `gatewright.data.robot_arm`, {plan['train']} cases to train on and {plan['test']} to "
        f"test, seed "
        f"{plan['data_seed']}; its constants are ours, so errors are to be compared with each other, not "
        f"with the "
        "paper's. Relative error: squared error on the test cases over that of their own mean, at its least "
        "over the "
        "epochs, as in the paper (which so chooses the epoch on test cases); epochs: the first within 5 % of "
        "it. "
        f"First weights even from -0.1 to 0.1, the gates' from -1 to 1, seeds "
        f"{', '.join(map(str, plan['seeds']))}, all shown. "
        f"Covariance of "
        f"the experts: {em['covariance']}, floor {em['floor']:g}; ln h cut at {em['least_log']:g} in "
        f"algorithm 2. The "
        f"paper's on-line and gradient figures are of its table 2. CART chose leaves of at least "
        f"{', '.join(map(str, cart['leaf_sizes']))} cases for its outputs, {sum(cart['leaves'])} leaves in "
        f"all. All "
        f"systems together took {seconds / 60:.1f} CPU minutes.",
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, own: Record, paper: list[Any], plan: Record) -> list[str]:
    spread = "-" if own["error_sd"] is None else f"{own['error_sd']:.4f}"
    theirs = "-" if paper[1] is None else str(paper[1])
    return [
        name,
        WHAT[name].format(**plan),
        f"{own['error_mean']:.3f} ({paper[0]:.2f})",
        spread,
        f"{'-' if paper[1] is None else format(own['epochs_mean'], '.0f')} ({theirs})",
        " ".join(f"{error:.4f}" for error in own["least"]),
        " ".join(map(str, own["epochs"])),
        " ".join(f"{error:.4f}" for error in own["last"]),
        f"{own['cpu_seconds']:.1f}",
    ]


def hme_pictures(record: Record, work: Path) -> dict[str, Path]:
    """Draw every run's error by epoch and return the picture by name."""
    path = work / "learning.png"
    curves = {
        name: [(run["epochs"], run["errors"]) for run in own["runs"]]
        for name, own in record["systems"].items()
    }
    draw_learning(curves, "relative error on the test cases", path)
    return {"learning": path}
