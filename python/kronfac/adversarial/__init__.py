"""Adversarial examples by the gradient of the loss, and how a model stands up to them."""

from __future__ import annotations

from kronfac.adversarial.attacks import fgsm as fgsm
from kronfac.adversarial.attacks import l2 as l2
from kronfac.adversarial.attacks import pgd as pgd
from kronfac.adversarial.robustness import Accuracy as Accuracy
from kronfac.adversarial.robustness import RobustAccuracyResult as RobustAccuracyResult
from kronfac.adversarial.robustness import robust_accuracy as robust_accuracy
