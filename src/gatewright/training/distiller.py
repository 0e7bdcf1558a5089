"""A trainer whose model learns from a teacher, and may start from the teacher's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatewright.data import Corpus
from gatewright.errors import UserError
from gatewright.objectives import Loss, check_teacher_weight, distilled
from gatewright.parts import MoELayer, Stats
from gatewright.parts.running import RunningCounts
from gatewright.training.checkpoint import Checkpoint
from gatewright.training.run import TrainRun
from gatewright.training.state import saved_buffers
from gatewright.training.trainer import Trainer


@dataclass(frozen=True)
class Start:
    """Names of the student's weights: those `copied` from the teacher, and those that are `new`."""

    copied: tuple[str, ...]
    new: tuple[str, ...]


@torch.no_grad()
def copy_non_experts(teacher: nn.Module, student: nn.Module) -> Start:
    """Copy into `student` every weight of the same name and shape that stands outside the teacher's sparse
    layers, and return which those were.

    Equation: Switch Transformer section 4.2, "initializing the dense model with the non-expert weights".
    """
    sparse = tuple(f"{name}." for name, own in teacher.named_modules() if isinstance(own, MoELayer))
    given = dict(teacher.named_parameters())
    copied, new = [], []
    for name, weight in student.named_parameters():
        held = given.get(name)
        if held is None or name.startswith(sparse) or held.shape != weight.shape:
            new.append(name)
        else:
            weight.copy_(held)
            copied.append(name)
    return Start(tuple(copied), tuple(new))


def digest_of(model: nn.Module) -> str:
    """Return a checksum over a model's weights and what its rules have learned."""
    found = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *saved_buffers(model)]):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class Distiller(Trainer):
    """Trains a student; everything but its loss and its start is a trainer's.

    Args: `teacher` is put into evaluation mode and gets no gradient. `teacher_weight` as `distilled`; 0 does
    not ask the teacher. `copy`: start from the teacher's non-expert weights.
    """

    def __init__(
        self,
        run: TrainRun,
        corpus: Corpus,
        name: str,
        teacher: nn.Module,
        teacher_weight: float = 0.25,
        copy: bool = True,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_weight, self.copy = check_teacher_weight(teacher_weight), copy
        self.teacher_digest = digest_of(teacher)
        super().__init__(run, corpus, name)

    def fresh_model(self) -> Any:
        """Return the student, with the teacher's non-expert weights where they are asked for."""
        student: nn.Module = super().fresh_model()
        names = tuple(name for name, _ in student.named_parameters())
        self.start = copy_non_experts(self.teacher, student) if self.copy else Start((), names)
        return student

    def loss_of(self, micro: Tensor, key: Tensor, running: RunningCounts) -> tuple[Loss, Stats]:
        """Return the student's loss on a micro-batch, the teacher's opinion of it mixed in."""
        output, targets = self.ask(self.model, micro, key)
        loss = self.objective(output, targets, **self._counts(running, output.stats))
        if self.teacher_weight:
            with torch.no_grad():
                taught = self.ask(self.teacher, micro, key)[0].logits
            loss = distilled(loss, output.logits, taught, self.teacher_weight)
        return loss, output.stats

    def _taught_by(self) -> dict[str, object]:
        return {"teacher_weight": self.teacher_weight, "copy": self.copy, "teacher": self.teacher_digest}

    def checkpoint(self) -> Checkpoint:
        """Return a trainer's checkpoint that also says who taught, and how."""
        held = super().checkpoint()
        return Checkpoint(held.step, held.tensors, {**held.state, "distillation": self._taught_by()})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue. Raises: UserError also where another teacher, weight or start was used before."""
        held = checkpoint.state.get("distillation")
        if isinstance(held, Mapping):
            for key, value in self._taught_by().items():
                if held.get(key) != value:
                    raise UserError(
                        f"{key} is {value} but the run was begun with {held.get(key)}; resume with the same, "
                        "or give another --out"
                    )
        super().restore(checkpoint)
