"""What Windows forbids and this machine would let pass."""

import fcntl
import os
from pathlib import Path

import pytest
import torch

from personalize.trainers import artifact
from personalize.trainers.artifact import Header, Personalization, atomic
from personalize.trainers.errors import DiskError
from personalize.trainers.run import Run


def test_a_file_is_synced_through_a_descriptor_that_may_write(tmp_path, monkeypatch):
    synced = []

    def fsync_on_windows(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_on_windows)
    header = Header("lora", 1, {}, {}, "a zib totem", "", "0" * 16)
    tensors = {"lora_unet_conv_in.lora_up.weight": torch.ones(2, 2)}
    Personalization(header, tensors).save(tmp_path / "last.safetensors")
    assert len(synced) == 1
    assert Personalization.load(tmp_path / "last.safetensors").header == header


@pytest.mark.parametrize("times", [2, 3])
def test_a_file_that_is_being_read_is_replaced_a_moment_later(tmp_path, monkeypatch, times):
    path, refused, replace = tmp_path / "last", [], os.replace
    path.write_text("before")

    def replace_on_windows(source, target):
        if len(refused) < times:
            refused.append(target)
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_on_windows)
    monkeypatch.setattr(artifact, "PAUSES", (0.001, 0.001))
    if times == 2:
        with atomic(path) as temporary:
            temporary.write_text("after")
        assert path.read_text() == "after"
    else:
        with pytest.raises(DiskError, match="Access is denied"), atomic(path) as temporary:
            temporary.write_text("after")
        assert path.read_text() == "before" and os.listdir(tmp_path) == ["last"]


@pytest.mark.parametrize("times", [2, 3])
def test_a_file_that_is_being_read_is_deleted_a_moment_later_or_stays(tmp_path, monkeypatch, times):
    """A run does not end for a state of a finished run, or a checkpoint too many."""
    refused, unlink, run = [], Path.unlink, Run(tmp_path)
    run.state.write_text("state")
    run.path("step 1").write_text("checkpoint")

    def unlink_on_windows(path: Path, missing_ok: bool = False) -> None:
        if refused.count(path) < times:
            refused.append(path)
            raise PermissionError(13, "Access is denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_on_windows)
    monkeypatch.setattr(artifact, "PAUSES", (0.001, 0.001))
    run.forget_state()
    run.remove(1)
    assert len(os.listdir(tmp_path)) == (0 if times == 2 else 2)
