"""What distillation kept: the share of the teacher's gain, and how much smaller the student is."""

from __future__ import annotations


def gain_kept(student: float, teacher: float, dense: float) -> float | None:
    """Return the per cent of the teacher's gain over the dense model that the student has: 100 is the
    teacher's quality, 0 the dense model's. None where the teacher has no gain.

    Equation: Switch Transformer section 4.2, 100 (student - dense) / (teacher - dense), of log perplexities;
    for bits per byte, where less is better, all three turn and the quotient is the same.
    Args: three figures of merit of one kind, lower is better.
    """
    gain = dense - teacher
    return 100 * (dense - student) / gain if gain > 0 else None


def compression(student_parameters: int, teacher_parameters: int) -> float:
    """Return by how many per cent of its parameters the teacher was compressed: 100 (1 - student / teacher).

    Differs: table 7's per cents fit a student counted without its embedding, 198M of 223M (see its page).
    """
    return 100 * (1 - student_parameters / teacher_parameters)
