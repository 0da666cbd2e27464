"""What Windows forbids and this machine would let pass."""

import fcntl
import os

import pytest
import torch

from personalize.trainers import artifact
from personalize.trainers.artifact import Header, Personalization, atomic
from personalize.trainers.errors import DiskError


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
