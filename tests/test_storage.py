"""Paths and URLs alike, files that appear whole, and second tries."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from upath import UPath

from gemma_xla import storage
from gemma_xla.errors import UserError
from gemma_xla.storage import copy_tree, fetched, is_local, location, move, remove_tree, replace_text, retried


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path) -> Path:
    folder = tmp_path / "root" if request.param == "disk" else UPath(f"memory://{tmp_path}/root")
    folder.mkdir(parents=True)
    return folder


def test_a_path_is_local_and_a_url_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert location("~/run") == tmp_path / "run"
    assert location(f"file://{tmp_path}/run") == tmp_path / "run"
    assert location(tmp_path) == tmp_path and is_local(location("a/b"))
    bucket = location("memory://bucket/run")
    assert not is_local(bucket) and str(bucket / "x") == "memory://bucket/run/x"
    assert location(bucket) == bucket


@pytest.mark.parametrize(("url", "reason"), [("gopher://a/b", "Unsupported filesystem"), ("gs://bucket/run", "gcsfs")])
def test_a_url_that_nothing_can_open_is_refused(url, reason, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=f"^{url}: such URLs cannot be opened: .*{reason}"):
        location(url)


def test_folders_are_copied_moved_and_removed(root, tmp_path):
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "deep").write_bytes(bytes(range(256)) * 5000)
    (root / "a" / "shallow").write_text("x")
    copy_tree(root / "a", tmp_path / "copy")
    assert (tmp_path / "copy" / "b" / "deep").read_bytes() == bytes(range(256)) * 5000
    copy_tree(tmp_path / "copy", root / "back")
    assert (root / "back" / "b" / "deep").read_bytes() == bytes(range(256)) * 5000
    move(root / "back", root / "moved")
    assert not (root / "back" / "shallow").exists() and (root / "moved" / "shallow").read_text() == "x"
    remove_tree(root / "moved")
    assert not (root / "moved" / "shallow").exists()
    remove_tree(root / "never there")
    with fetched(root / "a") as local:
        assert is_local(local) and local.name == "a" and (local / "shallow").read_text() == "x"
    assert (root / "a" / "shallow").exists()


def test_a_text_is_replaced_whole_or_not_at_all(root, monkeypatch):
    replace_text(root / "file", "first")
    replace_text(root / "file", "second")
    assert (root / "file").read_text() == "second"

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "sync", full)
    if is_local(root):
        with pytest.raises(OSError, match="No space left"):
            replace_text(root / "file", "third")
        assert (root / "file").read_text() == "second"
    assert [path.name for path in root.iterdir()] == ["file"]


@pytest.mark.parametrize(("code", "tries"), [(errno.ENOSPC, 1), (errno.EACCES, 1), (errno.EIO, 4), (None, 4)])
def test_only_what_may_pass_is_tried_again(monkeypatch, code, tries):
    monkeypatch.setattr(storage, "DELAYS", (0.001, 0.002, 0.003))
    calls, said = [], []

    def fails():
        calls.append(1)
        raise OSError(code, "no") if code else ValueError("HTTP 503")

    with pytest.raises((OSError, ValueError)):
        retried(fails, "writing", said.append)
    assert (len(calls), len(said)) == (tries, tries - 1)
    assert retried(lambda: 5, "reading", said.append) == 5
