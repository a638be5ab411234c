"""What llama.cpp was built for, what it can compute on, and the memory there."""

from __future__ import annotations

import sys

from msgspec import Struct

from mtpbatch.native._library import ffi, lib


class Device(Struct, frozen=True):
    """Where models can be. The first one is the CPU, whose memory is the machine's."""

    name: str
    """llama.cpp's name for it, such as ``CUDA0``."""
    description: str
    free: int
    """Bytes that nobody has taken; 0: it does not say."""
    total: int
    """Bytes that it has."""


class Memory(Struct, frozen=True):
    """What a context takes on a device, in bytes."""

    weights: int
    """The model's, once for all of its contexts."""
    states: int
    """KV cells and recurrent states of all sequences."""
    compute: int
    """What layers compute in a forward pass."""
    logits: int
    """Those of one decode, at most: they come with decodes that need so many."""
    hidden_rows: int
    """The same of what heads draft from, if a session drafts; of an MTP context also what waits
    there for its turn."""


def devices() -> tuple[Device, ...]:
    """The CPU, and the GPUs that this build of llama-cpp-python can use."""
    lib.mtpbatch_capture_logs("llama_cpp" in sys.modules)
    found = []
    for index in range(lib.mtpbatch_device_count()):
        device = ffi.new("mtpbatch_device *")
        lib.mtpbatch_device_get(index, device)
        name, description = (
            ffi.string(text).decode("utf-8", "replace")
            for text in (device.name, device.description)
        )
        found.append(Device(name, description, device.free_bytes, device.total_bytes))
    return tuple(found)


def build_flags() -> str:
    """llama.cpp's own words on its back-ends and the instruction sets they were compiled for."""
    lib.mtpbatch_capture_logs("llama_cpp" in sys.modules)
    text: bytes = ffi.string(lib.mtpbatch_build_flags())
    return text.decode("utf-8", "replace").strip()
