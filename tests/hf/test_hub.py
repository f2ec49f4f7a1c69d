"""Uploads to a stand-in for the hub, and what is said when it takes none."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from gemma_xla.errors import UserError
from gemma_xla.hf import check_push, push
from tests.hf.hub import TOKEN, Hub, serving


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(Hub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["me/tiny", "us/tiny", "tiny"])
def test_a_folder_is_uploaded_to_a_private_repository(hub, folder, name):
    check_push(name)
    full = name if "/" in name else f"me/{name}"
    assert push(folder, name) == f"{hub.url}/{full}"
    assert dict(hub.files(full)) == contents(folder)
    assert hub.private[full] is True


def test_weights_of_an_earlier_upload_go_and_nothing_else(hub, folder):
    hub.repositories["me/tiny"] = {
        ".gitattributes": b"",
        "notes.txt": b"mine",
        "config.json": b"old",
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"old",
    }
    hub.private["me/tiny"] = False
    push(folder, "me/tiny")
    assert dict(hub.files("me/tiny")) == {".gitattributes": b"", "notes.txt": b"mine"} | contents(folder)
    assert hub.private["me/tiny"] is False  # as it was


def said_by(action, *arguments) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_who_may_not_upload_hears_it_before(hub):
    assert said_by(check_push, "them/tiny") == (
        "them/tiny: nothing can be uploaded to it: you are logged in as me and may write to me, us; choose one of "
        "them, or log in as another with `hf auth login`"
    )
    assert "it is not the name of a repository, such as me/my-gemma; choose" in said_by(check_push, "a/b/c")
    hub.user["auth"]["accessToken"]["role"] = "read"
    assert "me/tiny: nothing can be uploaded to it: your token may only read; make" in said_by(check_push, "me/tiny")


def test_without_a_token_or_with_a_wrong_one(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "me/tiny: nothing can be uploaded to it: the Hugging Face hub does not know your token; run `hf auth" in (
        said_by(check_push, "me/tiny")
    )
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody is logged in; run `hf auth login`" in said_by(check_push, "me/tiny")
    assert "run `hf auth login`" in said_by(push, folder, "me/tiny")


@pytest.mark.parametrize("refused", ["create", "commit"])
def test_what_may_not_be_written_is_explained_and_the_folder_stays(hub, folder, refused):
    hub.refuse[refused] = 403
    before = contents(folder)
    assert said_by(push, folder, "me/tiny") == (
        f"me/tiny: {folder} could not be uploaded to it: your token does not allow it; choose another name, or log in "
        f"with `hf auth login`; the folder is whole: upload it later with `hf upload me/tiny {folder}`"
    )
    assert contents(folder) == before


def test_without_a_connection(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "me/tiny: nothing can be uploaded to it: the Hugging Face hub says: " in said_by(check_push, "me/tiny")
    assert said_by(push, folder, "me/tiny").endswith(f"with `hf upload me/tiny {folder}`")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in said_by(check_push, "me/tiny")
