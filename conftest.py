"""For every test: one thread in each of several workers, and no network: who asks for another machine is refused."""

import os
import socket

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # before torch is imported: workers that each took every processor would mostly wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LOCAL = ("", "0.0.0.0", "::", "::1", "localhost")


def is_local(host: object) -> bool:
    """Whether a host is this machine; addresses of other families (of files) have no host."""
    host = host.decode() if isinstance(host, bytes) else host
    return host is None or host in (*LOCAL, socket.gethostname()) or str(host).startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuse connections and look-ups beyond this machine."""
    connect, connect_ex, look_up = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def checked(original):
        def call(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
                raise ConnectionRefusedError(f"a test asked for the network: {address}")
            return original(self, address)

        return call

    def checked_look_up(host, *arguments, **options):
        if not is_local(host):
            raise socket.gaierror(f"a test asked for the address of {host}")
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", checked(connect))
        patched.setattr(socket.socket, "connect_ex", checked(connect_ex))
        patched.setattr(socket, "getaddrinfo", checked_look_up)
        yield
