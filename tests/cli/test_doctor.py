"""`omninorm doctor`: what is here, and what to do about what is not."""

from __future__ import annotations

import json

import torch

from omninorm.experiments import provenance
from omninorm.kernels.dispatch import backends


def test_json_tells_versions_machine_and_back_ends(command):
    code, out, err = command("doctor", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert told["versions"]["torch"] == torch.__version__
    assert told["machine"]["threads"] == torch.get_num_threads()
    assert told["machine"]["cores"] >= 1
    assert told["machine"]["memory_gib"] > 0.1
    assert [each["name"] for each in told["backends"]] == [backend.name for backend in backends()]


def test_what_is_missing_is_named_with_its_remedy(command, monkeypatch):
    monkeypatch.setitem(provenance.OPTIONAL, "a-package-that-is-not", ("nothing", "demo"))
    code, out, _ = command("doctor")
    assert code == 0
    assert 'a-package-that-is-not is missing (nothing): pip install "omninorm[demo]"' in out
    assert torch.__version__ in out
    for backend in backends():
        assert backend.reason in out
