"""Attacks: functions `(model, inputs, labels, *, eps, norm, ...) -> AttackResult`."""

from flatreg.attacks.apgd import apgd
from flatreg.attacks.cascade import cascade
from flatreg.attacks.fgsm import fgsm
from flatreg.attacks.path import AttackPath, attack_path
from flatreg.attacks.pgd import pgd
from flatreg.attacks.result import Attack, AttackResult

__all__ = ["Attack", "AttackPath", "AttackResult", "apgd", "attack_path", "cascade", "fgsm", "pgd"]
