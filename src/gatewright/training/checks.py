"""What is checked before a run begins: settings, text, device and the size of a micro-batch."""

from __future__ import annotations

import torch

from gatewright.backbones import on_no_memory
from gatewright.data import Corpus
from gatewright.errors import UserError
from gatewright.papers.registry import get_trained_paper
from gatewright.training.run import TrainRun, require_finite


def check_settings(run: TrainRun) -> None:
    """Raise UserError for settings that no text can make work; needs no memory and no corpus."""
    paper = get_trained_paper(run.paper)
    settings = paper.Settings() if run.model is None else run.model
    require_finite(settings)
    resolve_device(run.device)
    with on_no_memory():
        paper.build(settings)
    paper.objective(settings)
    micro_batch_size(run, settings.context)


def check_text(run: TrainRun, corpus: Corpus) -> None:
    """Raise UserError if the corpus is too small for one sequence of the run."""
    context = (get_trained_paper(run.paper).Settings() if run.model is None else run.model).context
    corpus.stream(1, context, fraction=run.data_fraction)


def resolve_device(name: str) -> torch.device:
    """Return the device. Raises: UserError if it is unknown or not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}; allowed: cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UserError(f"device {name!r}; allowed: cpu, cuda or cuda:N")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use "
            "--device cpu"
        )
    return device


def micro_batch_size(run: TrainRun, context: int) -> int:
    """Return the rows of a micro-batch. Raises: UserError unless batch_tokens splits into whole rows and
    micro-batches.
    """
    if context < 1:
        raise UserError(f"context {context}; allowed: 1 or more")
    rows, left = divmod(run.batch_tokens, context)
    if left or rows < 1 or rows % run.accumulation:
        raise UserError(
            f"batch_tokens {run.batch_tokens} with context {context} and accumulation {run.accumulation}; "
            f"allowed: a multiple of context x accumulation = {context * run.accumulation}"
        )
    return rows // run.accumulation
