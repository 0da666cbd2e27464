"""What Windows forbids and this machine would let pass."""

import fcntl
import os

import torch

from personalize.trainers.artifact import Header, Personalization


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
