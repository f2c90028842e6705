"""How a sweep reads in the terminal."""

from __future__ import annotations

from flatreg.data.sources import source_name
from flatreg.report.rows import clean_kappa
from flatreg.report.tables import (
    flags,
    legend,
    number,
    percent,
    terminal,
    wrapped,
)
from flatreg.run.sweep import Sweep, Trial


def sweep_table(result: Sweep) -> str:
    """All trials and the best of them, at most 100 columns wide."""
    recipe, threat = result.recipe, result.recipe["evaluation"]
    n = next((trial.evaluation.n for trial in result.trials if trial.evaluation), 0)
    heads = (result.key, "clean %", "attacked %", "kappa", "kappa*", "seconds")
    if result.best is None:
        best = "none: every training failed"
    elif result.tied:
        tied = ", ".join(map(str, result.tied))
        best = f"{result.best} by attacked accuracy; its interval covers also: {tied}"
    else:
        best = f"{result.best} by attacked accuracy; its interval covers no other value"
    found = [f"{t.value}: {flag}" for t in result.trials for flag in flags(t.findings)]
    lines = [
        f"{source_name(recipe['data'])}, {recipe['model']['name']}, arm {result.arm}, "
        f"{recipe['epochs']} epochs, seed {recipe['seed']}; "
        f"{threat['norm']} eps {threat['eps']:.4g}, n = {n} held-back images",
        *terminal(heads, map(_cells, result.trials)),
        "",
        *wrapped("best", best),
        *legend("[..]", "kappa", "kappa*"),
        *wrapped("seed", "another seed may move a number by more than its interval"),
        *wrapped("findings", "; ".join(found) or "none flagged"),
    ]
    return "\n".join(line[:100] for line in lines)


def _cells(trial: Trial) -> list[str]:
    if trial.evaluation is None:
        return [str(trial.value), f"failed: {trial.failure}"]
    return [
        str(trial.value),
        percent(trial.evaluation.clean),
        percent(trial.evaluation.attacked),
        number(clean_kappa(trial.relative_flatness, matched=False)),
        number(clean_kappa(trial.relative_flatness, matched=True)),
        f"{trial.seconds:.0f}",
    ]
