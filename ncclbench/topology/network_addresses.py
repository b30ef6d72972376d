"""How ranks on other nodes reach this one, before anything else connects them."""

import fcntl
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress

from ncclbench.errors import EnvironmentFault

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # Linux: an interface's address
# Any address that needs a route: a UDP socket that is connected there sends nothing, but learns its own address.
_ELSEWHERE = ("192.0.2.1", 9)


def own_hosts() -> list[str]:
    """Names and addresses of this node, the likeliest to be reachable from others first; never empty.

    The host name comes first where it resolves at all, since a cluster's names point at the network that is meant.
    """
    found = []
    name = socket.gethostname()
    with suppress(OSError):
        socket.getaddrinfo(name, None)
        found.append(name)
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(_ELSEWHERE)
        found.append(probe.getsockname()[0])
    # A cluster's network need not lead anywhere else, nor its names be known to it.
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
