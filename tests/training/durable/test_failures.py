import errno

import pytest
import torch
import torch.distributed as dist

from cdit.common.errors import Interrupted, UserError
from cdit.training.durable.failures import explained


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried …"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_want_of_memory_comes_with_advice(error: Exception):
    with pytest.raises(UserError, match=r"out of memory: try a smaller micro_batch_size") as caught, explained():
        raise error
    assert "\n" not in str(caught.value)


def test_what_torch_itself_raises_for_want_of_memory():
    with pytest.raises(UserError, match="micro_batch_size"), explained():
        torch.empty(1 << 60, dtype=torch.uint8)


def test_lost_processes_are_an_interruption(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Interrupted, match=r"--resume auto"), explained():
        raise dist.DistNetworkError("The client socket has failed to connect")
    reset = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:3000")
    with pytest.raises(RuntimeError), explained():
        raise reset  # alone, there is nobody to lose
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(Interrupted, match="another process is gone"), explained():
        raise reset


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(2, "No such file")]
)
def test_other_errors_stay_what_they_are(error: Exception):
    with pytest.raises(type(error)) as caught, explained():
        raise error
    assert caught.value is error
