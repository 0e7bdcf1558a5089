"""The lineage: fifteen papers in order, complete records, and errors that lead on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gatewright.errors import UserError
from gatewright.papers import (
    all_papers,
    get_paper,
    get_text_paper,
    get_trained_paper,
    paper_info,
    published,
    published_names,
    text_papers,
    trained_papers,
    wired_papers,
)

ROOT = Path(__file__).resolve().parents[2]
LINEAGE = [
    *(("local_experts", 1991), ("hme", 1994), ("deep_moe", 2013), ("sparsely_gated", 2017)),
    *(("gshard", 2020), ("switch", 2021), ("glam", 2021), ("vmoe", 2021), ("st_moe", 2022)),
    *(("expert_choice", 2022), ("mixtral", 2024), ("deepseek_moe", 2024), ("deepseek_v2", 2024)),
    *(("deepseek_v3", 2024), ("olmoe", 2024)),
]
# Authors as the arXiv pages (the journals, before 2013) count them; DeepSeek's lists count the group itself.
NUM_AUTHORS = [4, 2, 3, 7, 9, 3, 27, 8, 8, 10, 26, 17, 156, 200, 24]


def test_the_lineage_is_complete_and_in_order():
    assert [(paper.id, paper.year) for paper in all_papers()] == LINEAGE
    assert [len(paper.authors) for paper in all_papers()] == NUM_AUTHORS
    deepseek = ("deepseek_moe", "deepseek_v2", "deepseek_v3")
    classics = ("local_experts", "hme", "deep_moe", "sparsely_gated")
    assert wired_papers() == (*classics, "gshard", "switch", "mixtral", *deepseek, "olmoe")
    models = ("qwen2_moe", "qwen3_moe", "gpt_oss", "llama4")
    assert text_papers() == ("sparsely_gated", "switch", "mixtral", *deepseek, "olmoe", *models)
    assert trained_papers() == (*text_papers(), "gshard", "switch_t5")


def test_records_are_whole():
    for paper in all_papers():
        assert paper.added.endswith(".")
        assert paper.added.count(". ") == 0, f"{paper.id}: one sentence"
        assert paper.title
        assert paper.venue
        for author in paper.authors:
            assert " " in author or author == "DeepSeek-AI", f"{paper.id}: {author} has no full name"
            assert not author.startswith(("and ", "et al"))


@pytest.mark.parametrize(
    ("paper", "first", "last"),
    [
        ("local_experts", "Robert A. Jacobs", "Geoffrey E. Hinton"),
        ("switch", "William Fedus", "Noam Shazeer"),
        ("mixtral", "Albert Q. Jiang", "William El Sayed"),
        ("deepseek_moe", "Damai Dai", "Wenfeng Liang"),
        ("deepseek_v3", "DeepSeek-AI", "Zizheng Pan"),
        ("olmoe", "Niklas Muennighoff", "Hannaneh Hajishirzi"),
    ],
)
def test_first_and_last_authors(paper: str, first: str, last: str):
    authors = paper_info(paper).authors
    assert (authors[0], authors[-1]) == (first, last)


def test_every_paper_has_its_page_and_no_page_lacks_a_paper():
    pages = {path.stem for path in (ROOT / "docs" / "papers").glob("*.md")}
    assert pages == {paper.id for paper in all_papers()}
    for paper in all_papers():
        text = (ROOT / paper.page).read_text(encoding="utf-8")
        assert paper.title in text, paper.page
        assert f"Status: {paper.status}" in text, paper.page


def test_wired_papers_and_models_have_all_parts():
    for paper_id in {*wired_papers(), *text_papers()}:
        file = get_paper(paper_id)
        for part in ("Settings", "PUBLISHED", "build", "objective", "DEVIATIONS"):
            assert hasattr(file, part), f"{paper_id} lacks {part}"


def test_published_sizes_are_found_by_name():
    assert set(published_names()) >= {"mixtral-8x7b", "mixtral-8x22b", "olmoe-1b-7b"}
    paper, settings = published("olmoe-1b-7b")
    assert paper == "olmoe"
    assert settings.num_experts == 64


@pytest.mark.parametrize(
    ("call", "name", "message"),
    [
        (get_paper, "mixtrel", "did you mean 'mixtral'"),
        (
            get_paper,
            "glam",
            "planned and cannot be built yet; allowed: local_experts, hme, deep_moe, sparsely_gated",
        ),
        (
            get_text_paper,
            "local_experts",
            "does not train on text; allowed: sparsely_gated, switch, mixtral, .*llama4, gshard",
        ),
        (get_text_paper, "hme", "does not train on text; allowed: sparsely_gated, switch, mixtral, .*llama4"),
        (get_trained_paper, "local_experts", "switch_t5; its own experiments are"),
        (get_text_paper, "switch_t5", "is an encoder-decoder, for `train`, `eval` and `plan`; allowed here"),
        (get_text_paper, "gpt_os", "did you mean 'gpt_oss'"),
        (get_text_paper, "glam", "planned and cannot be built yet"),
        (paper_info, "deepseek-v3", "did you mean 'deepseek_v3'"),
        (published, "mixtral-8x7", "did you mean 'mixtral-8x7b'"),
        (published, "zzz", "allowed: .*olmoe-1b-7b"),
    ],
)
def test_unknown_names_lead_on(call: object, name: str, message: str):
    assert callable(call)
    with pytest.raises(UserError, match=message) as caught:
        call(name)
    assert "\n" not in str(caught.value)


def test_the_lineage_is_read_without_torch():
    code = (
        "import sys; from gatewright.papers import all_papers, paper_info; all_papers(); paper_info('hme');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
