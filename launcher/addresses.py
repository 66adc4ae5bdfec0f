"""Where the nodes of a run reach each other: any of them may come to hold an attempt's store."""

from __future__ import annotations

from launcher.channel import address_towards, is_loopback

__all__ = ["Addresses"]


class Addresses:
    """By node. own: what a person says of this host (or of a fleet's first), if anything."""

    def __init__(self, own: str | None) -> None:
        self._own = own
        self._of: dict[int, str | None] = {}
        self._here: set[int] = set()  # nodes on this very host, which nobody reaches by its loopback
        self._towards: str | None = None  # this host's address on the way to the others

    def of(self, node: int) -> str | None:
        """None if it is on this host, and nobody has said so far how others reach that."""
        if node in self._here:
            return self._towards or self._of[node]
        return self._of[node]

    def of_all_here(self) -> dict[int, str | None]:
        return {node: self.of(node) for node in self._here}

    def spawned_here(self, node: int) -> None:
        """Its agent was started right here."""
        self._of[node] = self._own
        if self._own is None:
            self._here.add(node)

    def connected(self, node: int, address: str, reached: str) -> None:
        """Its agent came over a network, with `address` of its own, to `reached`, one of this host's."""
        self._of[node] = address
        if self._towards is None or is_loopback(self._towards):
            self._towards = reached

    def by_ssh(self, node: int, address: str | None) -> None:
        """Where ssh reached a host of the fleet, the others do too, unless that is its loopback: then it is this host,
        and has another address on the way to them.
        """
        self._here.discard(node)
        if node == 0 and self._own is not None:
            self._of[node] = self._own
            return
        self._of[node] = address
        if address is None:
            return
        if is_loopback(address):
            self._here.add(node)
        elif self._towards is None:
            self._towards = address_towards(address)
