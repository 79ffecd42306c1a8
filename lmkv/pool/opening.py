"""What a node opens as it starts: its control socket, and the card that describes it."""

from __future__ import annotations

import socket

import zmq

from lmkv import poolwire as pw
from lmkv.addresses import join_address, split_address
from lmkv.errors import ConfigError
from lmkv.ids import Incarnation
from lmkv.process import own_process
from lmkv.transport import Transport

from .memory import ArenaMemory
from .settings import NodeSettings

MOST_MESSAGE_BYTES = 16 << 20


def bind(context: zmq.Context[zmq.Socket[bytes]], listen: str) -> tuple[zmq.Socket[bytes], str, int]:
    """The ROUTER, its host and port. Raises ConfigError."""
    host, port = split_address(listen, listen=True)
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 200)
    router.setsockopt(zmq.IPV6, 1)
    router.setsockopt(zmq.RCVHWM, 16384)
    router.setsockopt(zmq.SNDHWM, 16384)
    router.setsockopt(zmq.MAXMSGSIZE, MOST_MESSAGE_BYTES)
    try:
        router.bind(join_address(host, port or "*"))
    except zmq.ZMQError as error:
        router.close()
        raise ConfigError(
            f"cannot listen on {listen}: {error}", hint="stop what uses it, or choose another --listen"
        ) from error
    _, port = split_address(router.getsockopt_string(zmq.LAST_ENDPOINT), listen=True)
    return router, host, port


def card_of(
    settings: NodeSettings,
    incarnation: Incarnation,
    host: str,
    port: int,
    events: str,
    transport: Transport | None,
    memory: ArenaMemory,
    share: str,
    identity: str,
) -> pw.NodeCard:
    """`host` and `port` are the ROUTER's; `identity` tells hosts apart."""
    return pw.NodeCard(
        settings.name or f"pool-{socket.gethostname()}-{port}",
        incarnation,
        join_address(settings.advertise or host, port),
        events,
        settings.transport.split(":")[0] if transport else "",
        transport.export() if transport else b"",
        memory.address,
        memory.capacity_bytes,
        share,
        identity,
        prefault=settings.prefault,
        process=own_process(),
    )
