"""Attacks: functions `(model, inputs, labels, *, eps, norm, ...) -> AttackResult`."""

from flatreg.attacks.apgd import apgd
from flatreg.attacks.bands import AlignedBands, Band, aligned_bands
from flatreg.attacks.cascade import cascade
from flatreg.attacks.fgsm import fgsm
from flatreg.attacks.fmn import fmn
from flatreg.attacks.noise import noise
from flatreg.attacks.path import AttackPath, attack_path
from flatreg.attacks.pgd import pgd
from flatreg.attacks.random_search import random_search
from flatreg.attacks.randomised import eot
from flatreg.attacks.result import Attack, AttackResult
from flatreg.attacks.square import square

__all__ = [
    "AlignedBands",
    "Attack",
    "AttackPath",
    "AttackResult",
    "Band",
    "aligned_bands",
    "apgd",
    "attack_path",
    "cascade",
    "eot",
    "fgsm",
    "fmn",
    "noise",
    "pgd",
    "random_search",
    "square",
]
