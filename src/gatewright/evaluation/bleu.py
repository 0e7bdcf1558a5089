"""BLEU of translations, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gatewright.errors import UserError


class Bleu(NamedTuple):
    """`score` from 0 to 100, and sacrebleu's signature: everything that another number must share."""

    score: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Bleu:
    """Return the BLEU of what a model wrote against one reference each, over all lines together.

    Raises: UserError without sacrebleu, or for lists of different lengths.
    """
    if len(hypotheses) != len(references) or not references:
        raise UserError(
            f"{len(hypotheses)} translations for {len(references)} references; allowed: one each, 1 or more"
        )
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise UserError(
            "sacrebleu is not installed; BLEU is its measure; pip install 'gatewright[translation]'"
        ) from None
    metric = BLEU()
    found = metric.corpus_score(list(hypotheses), [list(references)])
    return Bleu(float(found.score), str(metric.get_signature()))
