"""A double of lowbit_lora.transfer.Transfer, to which all memory of the CPU but what it gave out itself is a GPU's.

It copies as late as it may: a number that is read before anyone waited for it is NaN, or what was there before.
"""

import torch

from lowbit_lora.transfer import Transfer


class Copy:
    """One that was started."""

    def __init__(self, transfer: "LateTransfer", to: torch.Tensor, source: torch.Tensor):
        self.transfer, self.to, self.source = transfer, to, source
        self.versions = to._version, source._version
        self.value: torch.Tensor | None = None

    def read(self, ahead: dict[int, torch.Tensor]) -> torch.Tensor:
        """What the GPU read, ``ahead``: what it had written to the host before; an error if it was changed since."""
        if self.value is None:
            assert (self.to._version, self.source._version) == self.versions, "changed while a copy was under way"
            self.value = ahead.get(self.source.data_ptr(), self.source).clone()
        return self.value

    def synchronize(self) -> None:
        self.transfer.finish(upto=self)

    def forget(self) -> None:
        """Hold nothing any more, as an event of CUDA."""
        del self.to, self.source, self.value


class LateTransfer(Transfer):
    """See the module; ``log`` has what was done: "to host", "to device", "synchronize", "join"."""

    def __init__(self):
        self.log: list[str] = []
        self._hosts: dict[int, torch.Tensor] = {}
        self._under_way: list[Copy] = []

    @staticmethod
    def is_near(tensor: torch.Tensor) -> bool:
        """Whether it is to be one of the host's although it was not given out here; tests change this."""
        return False

    def is_remote(self, tensor):
        is_host = tensor.numel() and tensor.data_ptr() in self._hosts
        return tensor.device.type == "cpu" and not is_host and not self.is_near(tensor)

    def host_like(self, tensor, memory_format=torch.preserve_format):
        host = torch.empty_like(tensor.detach(), memory_format=memory_format)
        self._hosts[host.data_ptr()] = host  # kept, so that no other tensor gets its address
        return host

    def copy(self, to, source):
        self.log.append("to device" if self.is_remote(to) else "to host")
        with torch.no_grad():
            to.fill_(float("nan") if to.is_floating_point() else -1)
        superseded = [copy for copy in self._under_way if copy.to is to]
        self._under_way = [copy for copy in self._under_way if copy not in superseded] + [Copy(self, to, source)]
        return self._under_way[-1]

    @torch.no_grad()
    def finish(self, upto: Copy | None = None) -> None:
        """Do what was started, up to this copy."""
        while self._under_way if upto is None else upto in self._under_way:
            copy = self._under_way.pop(0)
            copy.to.copy_(copy.read({}))
            copy.forget()

    def synchronize(self):
        self.log.append("synchronize")
        self.finish()

    @torch.no_grad()
    def join(self):
        """The GPU goes on with what it has read and written; the host cannot read yet what was sent to it."""
        self.log.append("join")
        ahead, waiting = {}, []
        for copy in self._under_way:
            value = copy.read(ahead)
            if self.is_remote(copy.to):
                copy.to.copy_(value)
            else:
                ahead[copy.to.data_ptr()] = value
                waiting.append(copy)
        self._under_way = waiting
