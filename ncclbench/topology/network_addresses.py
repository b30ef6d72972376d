"""Names and addresses under which ranks on other nodes can reach this node."""

import fcntl
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress

from ncclbench.errors import EnvironmentFault

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # Linux: an interface's address
# An address that needs a route: connecting a UDP socket sends nothing, but gives the socket its local address.
ROUTED_ADDRESS = ("192.0.2.1", 9)


def local_addresses() -> list[str]:
    """Names and addresses of this node, the most likely to be reachable from other nodes first; never empty.

    The host name comes first if it resolves: in a cluster it usually belongs to the intended network.
    """
    found = []
    name = socket.gethostname()
    with suppress(OSError):
        socket.getaddrinfo(name, None)
        found.append(name)
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(ROUTED_ADDRESS)
        found.append(probe.getsockname()[0])
    # A cluster's network may have no route to the outside and no names.
    found += interface_addresses()
    return list(dict.fromkeys(found)) or [LOOPBACK]


def interface_addresses() -> list[str]:
    """The IPv4 address of every interface of this node that has one, loopback apart."""
    found = []
    for _, name in socket.if_nameindex():
        with suppress(OSError):  # it has no address
            found.append(_address(name))
    return [address for address in found if not address.startswith("127.")]


def address_of_interface(name: str) -> str:
    """The IPv4 address of a network interface; of a list, as gloo takes it, of the first.

    Raises:
        EnvironmentFault: if there is none such, or it has no address.
    """
    first = name.partition(",")[0]
    try:
        return _address(first)
    except OSError as error:
        raise EnvironmentFault(
            f"network interface {first!r} (of GLOO_SOCKET_IFNAME) on {socket.gethostname()}: "
            f"{error.strerror or error}; name one that has an IPv4 address"
        ) from None


def addresses_of_interfaces(names: str) -> list[str]:
    """The IPv4 addresses of those of `names`, joined by commas, that are network interfaces here and have one."""
    found = []
    for name in filter(None, names.split(",")):
        with suppress(OSError):
            found.append(_address(name))
    return found


def _address(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])


def connect_first(hosts: Iterable[str], port: int, timeout: float) -> socket.socket:
    """A connection to the first of `hosts` that answers on `port`.

    Raises:
        OSError: the last one's, if none answers within `timeout` seconds each.
    """
    failure: OSError = OSError("no host was named")
    for host in hosts:
        try:
            return socket.create_connection((host, port), timeout=timeout)
        except OSError as error:
            failure = error
    raise failure
