"""The lineage: fifteen papers from 1991 to 2024, what each added, and the way from an id to its paper file.

Reading the lineage loads neither torch nor a paper file; `get_paper` and `published` do.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal

from gatewright.errors import UserError, did_you_mean
from gatewright.papers import authors


@dataclass(frozen=True)
class PaperInfo:
    """One milestone. `status`: "wired" has a paper file that builds and trains, "planned" only its page.

    `trains_on`: "text" goes with every command; "spans", an encoder-decoder, with `train`, `eval` and `plan`;
    "cases" with the paper's own reproductions.
    """

    id: str
    year: int
    authors: tuple[str, ...]
    title: str
    venue: str
    added: str
    status: Literal["wired", "planned"] = "planned"
    trains_on: Literal["text", "spans", "cases"] = "text"

    @property
    def page(self) -> str:
        """The page's path in the repository."""
        return f"docs/papers/{self.id}.md"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.replace("\n", " ").split(",") if name.strip())


_LINEAGE: tuple[PaperInfo, ...] = (
    PaperInfo(
        "local_experts",
        1991,
        _names("Robert A. Jacobs, Michael I. Jordan, Steven J. Nowlan, Geoffrey E. Hinton"),
        "Adaptive Mixtures of Local Experts",
        "Neural Computation 3(1), 79-87",
        "A softmax gate and its experts, trained together as a mixture of Gaussians, so that experts "
        "compete for cases.",
        "wired",
        "cases",
    ),
    PaperInfo(
        "hme",
        1994,
        _names("Michael I. Jordan, Robert A. Jacobs"),
        "Hierarchical Mixtures of Experts and the EM Algorithm",
        "Neural Computation 6(2), 181-214",
        "A tree of gates over experts, fitted by expectation-maximisation instead of gradient descent.",
        "wired",
        "cases",
    ),
    PaperInfo(
        "deep_moe",
        2013,
        _names("David Eigen, Marc'Aurelio Ranzato, Ilya Sutskever"),
        "Learning Factored Representations in a Deep Mixture of Experts",
        "ICLR 2014 workshop, arXiv 1312.4314",
        "Mixtures stacked as layers of one network, and a rule that keeps experts equally used early "
        "in training.",
        "wired",
        "cases",
    ),
    PaperInfo(
        "sparsely_gated",
        2017,
        _names(
            "Noam Shazeer, Azalia Mirhoseini, Krzysztof Maziarz, Andy Davis, Quoc Le, Geoffrey Hinton, "
            "Jeff Dean"
        ),
        "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
        "ICLR 2017, arXiv 1701.06538",
        "Noisy top-k gating: only K of up to thousands of experts are computed, held in use by "
        "importance and load losses.",
        "wired",
    ),
    PaperInfo(
        "gshard",
        2020,
        _names(authors.GSHARD),
        "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
        "ICLR 2021, arXiv 2006.16668",
        "Experts inside the Transformer and spread over devices: top-2 gating with capacity, groups "
        "and a random second choice.",
        "wired",
        "spans",
    ),
    PaperInfo(
        "switch",
        2021,
        _names("William Fedus, Barret Zoph, Noam Shazeer"),
        "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
        "JMLR 23 (2022), arXiv 2101.03961",
        "One expert per token is enough, with a capacity factor, one balance loss, a small "
        "initialisation and an fp32 router.",
        "wired",
    ),
    PaperInfo(
        "glam",
        2021,
        _names(authors.GLAM),
        "GLaM: Efficient Scaling of Language Models with Mixture-of-Experts",
        "ICML 2022, arXiv 2112.06905",
        "A sparse decoder-only language model of 1.2 trillion parameters, measured zero- to few-shot "
        "against dense ones.",
    ),
    PaperInfo(
        "vmoe",
        2021,
        _names(authors.VMOE),
        "Scaling Vision with Sparse Mixture of Experts",
        "NeurIPS 2021, arXiv 2106.05974",
        "Sparse experts in the Vision Transformer, and batch priority: the surest tokens take the "
        "places first.",
    ),
    PaperInfo(
        "st_moe",
        2022,
        _names(authors.ST_MOE),
        "ST-MoE: Designing Stable and Transferable Sparse Expert Models",
        "arXiv 2202.08906",
        "The router z-loss, which steadies training, and a study of how sparse models fine-tune.",
    ),
    PaperInfo(
        "expert_choice",
        2022,
        _names(authors.EXPERT_CHOICE),
        "Mixture-of-Experts with Expert Choice Routing",
        "NeurIPS 2022, arXiv 2202.09368",
        "Experts choose their tokens: load is even by construction and tokens get different numbers "
        "of experts.",
    ),
    PaperInfo(
        "mixtral",
        2024,
        _names(authors.MIXTRAL),
        "Mixtral of Experts",
        "arXiv 2401.04088",
        "Open weights of a dropless decoder with experts in every layer, two of eight per token, "
        "weighed by a softmax over the two.",
        "wired",
    ),
    PaperInfo(
        "deepseek_moe",
        2024,
        _names(authors.DEEPSEEK_MOE),
        "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
        "ACL 2024, arXiv 2401.06066",
        "Many narrow experts instead of few wide ones, and shared experts that every token passes.",
        "wired",
    ),
    PaperInfo(
        "deepseek_v2",
        2024,
        _names(authors.DEEPSEEK_V2),
        "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        "arXiv 2405.04434",
        "Device-limited routing and balance of devices and communication, with a compressed key-value"
        " cache (latent attention).",
        "wired",
    ),
    PaperInfo(
        "deepseek_v3",
        2024,
        _names(authors.DEEPSEEK_V3),
        "DeepSeek-V3 Technical Report",
        "arXiv 2412.19437",
        "Balance without a loss: a bias per expert that only selects, over sigmoid scores and limited"
        " groups; multi-token prediction.",
        "wired",
    ),
    PaperInfo(
        "olmoe",
        2024,
        _names(authors.OLMOE),
        "OLMoE: Open Mixture-of-Experts Language Models",
        "ICLR 2025, arXiv 2409.02060",
        "Weights, data, code and logs all open: 64 small experts with 8 active, ablations of each "
        "choice, measures of specialisation.",
        "wired",
    ),
)

# Released models beside the lineage, made of the same parts, each in a file of a paper's form.
MODELS = ("qwen2_moe", "qwen3_moe", "gpt_oss", "llama4")


# Further files of a paper: another form of its model. The form's id, and the paper's.
FORMS = {"switch_t5": "switch", "sparsely_gated_mt": "sparsely_gated"}


def all_papers() -> tuple[PaperInfo, ...]:
    """Return the fifteen papers in lineage order."""
    return _LINEAGE


def wired_papers() -> tuple[str, ...]:
    """Return the ids that have a paper file, in lineage order."""
    return tuple(paper.id for paper in _LINEAGE if paper.status == "wired")


def text_papers() -> tuple[str, ...]:
    """Return the wired ids whose models are decoders of text, and MODELS: what every command takes."""
    return (*(p.id for p in _LINEAGE if p.status == "wired" and p.trains_on == "text"), *MODELS)


def trained_papers() -> tuple[str, ...]:
    """Return the ids that `train`, `eval` and `plan` take: the decoders, then the encoder-decoders."""
    spans = tuple(p.id for p in _LINEAGE if p.status == "wired" and p.trains_on == "spans")
    return (*text_papers(), *spans, "switch_t5")


def paper_info(paper_id: str) -> PaperInfo:
    """Return one paper's record. Raises: UserError for an unknown id."""
    for paper in _LINEAGE:
        if paper.id == paper_id:
            return paper
    ids = [*(paper.id for paper in _LINEAGE), *MODELS]
    raise UserError(
        f"paper {paper_id!r} is unknown{did_you_mean(paper_id, ids)}; allowed: {', '.join(wired_papers())}, "
        f"and the models {', '.join(MODELS)}; `gatewright papers` lists the lineage"
    )


def get_paper(paper_id: str) -> ModuleType:
    """Return the file of a paper or of one of MODELS as a module: Settings, PUBLISHED, build, objective,
    DEVIATIONS.

    Raises: UserError for an unknown id, and for a paper that is planned but not wired yet.
    """
    info = None if paper_id in MODELS else paper_info(FORMS.get(paper_id, paper_id))
    if info is not None and info.status == "planned":
        raise UserError(
            f"paper {paper_id!r} is planned and cannot be built yet; allowed: {', '.join(wired_papers())}; "
            f"its page is {info.page}"
        )
    return importlib.import_module(f"gatewright.papers.{paper_id}")


def get_text_paper(paper_id: str) -> ModuleType:
    """Return the paper file of a decoder. Raises: UserError for every other paper."""
    if paper_id in trained_papers() and paper_id not in text_papers():
        raise UserError(
            f"paper {paper_id!r} is an encoder-decoder, for `train`, `eval` and `plan`; allowed here: "
            f"{', '.join(text_papers())}"
        )
    return get_trained_paper(paper_id)


def get_trained_paper(paper_id: str) -> ModuleType:
    """Return the paper file as `get_paper` does. Raises: UserError also for a paper of no language model."""
    paper = get_paper(paper_id)
    if paper_id not in trained_papers():
        raise UserError(
            f"paper {paper_id!r} does not train on text; allowed: {', '.join(trained_papers())}; its own "
            "experiments are those of `gatewright reproduce`"
        )
    return paper


@cache
def _all_published() -> dict[str, tuple[str, Any]]:
    return {
        name: (paper_id, settings)
        for paper_id in trained_papers()
        for name, settings in get_paper(paper_id).PUBLISHED.items()
    }


def published_names() -> tuple[str, ...]:
    """Return the names of all published sizes of language models, in lineage order."""
    return tuple(_all_published())


def published(name: str) -> tuple[str, Any]:
    """Return (paper id, Settings) of a published size such as "mixtral-8x7b".

    Raises: UserError for an unknown name.
    """
    sizes = _all_published()
    if name not in sizes:
        raise UserError(
            f"published size {name!r} is unknown{did_you_mean(name, sizes)}; allowed: {', '.join(sizes)}"
        )
    return sizes[name]
