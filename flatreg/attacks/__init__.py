"""Attacks: functions `(model, inputs, labels, *, eps, **options) -> AttackResult`."""

from flatreg.attacks.apgd import apgd
from flatreg.attacks.bpda import bpda
from flatreg.attacks.cascade import cascade
from flatreg.attacks.eot import eot
from flatreg.attacks.fmn import fmn
from flatreg.attacks.options import Attack, AttackOptions, AttackResult
from flatreg.attacks.pgd import fgsm, noise, pgd
from flatreg.attacks.race import race
from flatreg.attacks.random_search import random_search
from flatreg.attacks.spot_check import spot_check
from flatreg.attacks.square import square

__all__ = [
    "Attack",
    "AttackOptions",
    "AttackResult",
    "apgd",
    "bpda",
    "cascade",
    "eot",
    "fgsm",
    "fmn",
    "noise",
    "pgd",
    "race",
    "random_search",
    "spot_check",
    "square",
]
