"""The pipelined client against a real server, and against sockets that misbehave as no real server does on demand."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from service.errors import ConfigurationError, StoreUnavailableError
from service.stores.resp import NotReplicatedError, ReplyError, RespClient, parse_endpoint

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


@pytest.fixture
async def client(valkey_server: ValkeyProcess) -> AsyncIterator[RespClient]:
    client = RespClient(valkey_server.url, timeout_seconds=10)
    yield client
    await client.close()


async def test_concurrent_callers_get_their_own_replies(client: RespClient) -> None:
    words = [os.urandom(size) for size in range(500)]
    assert await asyncio.gather(*(client.execute("ECHO", word) for word in words)) == words


async def test_pipelines_and_single_calls_interleave_in_order(client: RespClient) -> None:
    batches = [[("ECHO", f"{batch}.{i}") for i in range(batch)] for batch in range(30)]
    results = await asyncio.gather(*(client.pipeline(batch) for batch in batches), client.execute("ECHO", "last"))
    assert results == [*([command[1].encode() for command in batch] for batch in batches), b"last"]


async def test_a_large_reply_arrives_whole(client: RespClient) -> None:
    value = os.urandom(1 << 20) * 5
    assert await client.execute("ECHO", value) == value


async def test_several_connections_serve_all_callers(valkey_server: ValkeyProcess) -> None:
    client = RespClient(valkey_server.url, timeout_seconds=10, connections=3)
    connection_ids = await asyncio.gather(*(client.execute("CLIENT", "ID") for _ in range(12)))
    assert len(set(connection_ids)) == 3
    await client.close()


async def test_a_refused_command_raises_the_servers_sentence_and_harms_no_other_call(client: RespClient) -> None:
    await client.execute("SET", "resp:text", "x")
    results = await asyncio.gather(
        client.execute("ECHO", "before"),
        client.execute("XADD", "resp:text", "*", "a", "b"),
        client.execute("ECHO", "after"),
        return_exceptions=True,
    )
    assert results[0] == b"before"
    assert results[2] == b"after"
    assert isinstance(results[1], ReplyError)
    assert results[1].status == 503
    assert "WRONGTYPE" in str(results[1])


async def test_a_cancelled_call_does_not_shift_the_replies_of_others(client: RespClient) -> None:
    await client.execute("PING")
    doomed = asyncio.create_task(client.execute("ECHO", "doomed"))
    kept = asyncio.create_task(client.execute("ECHO", "kept"))
    await asyncio.sleep(0)
    doomed.cancel()
    assert await kept == b"kept"
    assert await client.execute("ECHO", "later") == b"later"
    assert doomed.cancelled()


async def test_nobody_listening_names_the_address_and_the_remedy(tmp_path: Path) -> None:
    client = RespClient(f"unix://{tmp_path}/none.sock", timeout_seconds=1)
    for _ in range(2):  # the second is refused by the back-off, in the same words
        with pytest.raises(StoreUnavailableError, match=r"cannot be reached; start the server.*none\.sock"):
            await client.execute("PING")
    await client.close()


async def test_a_stopped_server_times_out_and_is_used_again_when_it_wakes(own_valkey_server: ValkeyProcess) -> None:
    client = RespClient(own_valkey_server.url, timeout_seconds=0.2)
    await client.execute("PING")
    os.kill(own_valkey_server.pid, signal.SIGSTOP)
    try:
        results = await asyncio.gather(*(client.execute("PING") for _ in range(5)), return_exceptions=True)
    finally:
        os.kill(own_valkey_server.pid, signal.SIGCONT)
    assert [type(result) for result in results] == [StoreUnavailableError] * 5
    assert "did not answer within 0.2 s" in str(results[0])
    assert await eventually(lambda: client.execute("PING")) == b"PONG"
    await client.close()


async def test_a_killed_server_fails_calls_in_flight_and_is_found_again(own_valkey_server: ValkeyProcess) -> None:
    client = RespClient(own_valkey_server.url, timeout_seconds=10)
    blocked = asyncio.create_task(client.execute("BLPOP", "never", "60", timeout_seconds=60))
    await asyncio.sleep(0.05)
    own_valkey_server.kill()
    with pytest.raises(StoreUnavailableError, match="closed the connection"):
        await blocked
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        await client.execute("PING")
    own_valkey_server.start()
    assert await eventually(lambda: client.execute("PING")) == b"PONG"
    await client.close()


async def test_a_closed_client_refuses_further_calls(valkey_server: ValkeyProcess) -> None:
    client = RespClient(valkey_server.url, timeout_seconds=10)
    blocked = asyncio.create_task(client.execute("BLPOP", "never", "60"))
    await asyncio.sleep(0.05)
    await client.close()
    with pytest.raises(StoreUnavailableError, match="closed by us"):
        await blocked
    with pytest.raises(StoreUnavailableError, match="closed by us"):
        await client.execute("PING")


@pytest.mark.parametrize(
    ("setting", "value", "command", "remedy"),
    [
        ("maxmemory", b"1", ("SET", "k", "v"), "OOM.*maxmemory"),
        ("min-replicas-to-write", b"1", ("SET", "k", "v"), "NOREPLICAS.*replicas"),
        ("requirepass", b"secret", ("PING",), "NOAUTH.*password"),
    ],
)
async def test_a_server_that_cannot_serve_is_unavailable_with_a_remedy(
    own_valkey_server: ValkeyProcess, setting: str, value: bytes, command: tuple[str, ...], remedy: str
) -> None:
    own_valkey_server.ask(b"CONFIG SET maxmemory-policy noeviction\r\n")
    assert own_valkey_server.ask(b"CONFIG SET %b %b\r\n" % (setting.encode(), value)) == b"+OK\r\n"
    client = RespClient(own_valkey_server.url, timeout_seconds=10)
    with pytest.raises(StoreUnavailableError, match=remedy):
        await client.execute(*command)
    await client.close()


async def test_a_replica_is_unavailable_and_left(own_valkey_server: ValkeyProcess) -> None:
    client = RespClient(own_valkey_server.url, timeout_seconds=10)
    before = await client.execute("CLIENT", "ID")
    await client.execute("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StoreUnavailableError, match=r"READONLY.*point the store's URL at the primary"):
        await client.execute("SET", "k", "v")
    assert await client.execute("CLIENT", "ID") != before
    await client.close()


async def test_replicas_that_are_not_there_confirm_nothing_and_the_command_is_carried_out_all_the_same(
    client: RespClient,
) -> None:
    assert await client.pipeline([("SET", "resp:kept", "1")], replicas=0) == [b"OK"]
    with pytest.raises(NotReplicatedError, match="0 of 2 replicas confirmed; it may be stored all the same: repeat"):
        await client.pipeline([("INCR", "resp:kept")], timeout_seconds=2, replicas=2)
    assert await client.execute("GET", "resp:kept") == b"2"


async def test_a_replica_that_is_asked_to_wait_for_replicas_says_that_it_is_one(
    own_valkey_server: ValkeyProcess,
) -> None:
    client = RespClient(own_valkey_server.url, timeout_seconds=10)
    await client.execute("REPLICAOF", "127.0.0.1", "1")
    (reply,) = await client.pipeline([("SET", "k", "v")], replicas=1)
    with pytest.raises(StoreUnavailableError, match=r"READONLY.*point the store's URL at the primary"):
        client.checked(reply)
    with pytest.raises(StoreUnavailableError, match=r"WAIT cannot be used.*repeat the call"):
        await client.pipeline([("GET", "k")], replicas=1)
    await client.close()


async def test_user_password_and_database_of_the_url_are_used(own_valkey_server: ValkeyProcess) -> None:
    own_valkey_server.ask(b"ACL SETUSER ann on >p@ss ~* &* +@all\r\n")
    address = f"127.0.0.1:{own_valkey_server.port}"
    client = RespClient(f"redis://ann:p%40ss@{address}/3", timeout_seconds=10)
    assert await client.execute("ACL", "WHOAMI") == b"ann"
    assert b" db=3 " in await client.execute("CLIENT", "INFO")
    await client.close()
    wrong = RespClient(f"redis://ann:wrong@{address}/3", timeout_seconds=10)
    with pytest.raises(StoreUnavailableError, match=r"WRONGPASS.*correct user and password") as caught:
        await wrong.execute("PING")
    assert "ann:" not in str(caught.value)
    await wrong.close()


async def test_an_endpoint_is_shown_without_its_password() -> None:
    assert parse_endpoint("redis://u:hidden@h:1/2").shown == "redis://h:1/2"
    assert parse_endpoint("rediss://u:hidden@h").shown == "rediss://h:6379/0"
    assert parse_endpoint("unix://u:hidden@/tmp/s?db=1").shown == "unix:///tmp/s"


async def test_tls_verifies_certificates_unless_told_otherwise() -> None:
    strict, lax = parse_endpoint("rediss://h").tls, parse_endpoint("rediss://h?ssl_cert_reqs=none").tls
    assert strict is not None
    assert strict.check_hostname
    assert lax is not None
    assert not lax.check_hostname
    assert parse_endpoint("redis://h").tls is None


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "h:6379",
        "redis://h?colour=red",
        "rediss://h?ssl_cert_reqs=maybe",
        "rediss://h?ssl_colour=1",
        "rediss://h?ssl_ca_certs=/none",
        "unix://",
        "redis://h:port",
    ],
)
async def test_a_url_that_cannot_be_used_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigurationError, match="store's URL"):
        RespClient(url, timeout_seconds=1)


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
async def scripted(tmp_path: Path) -> AsyncIterator[Callable[[Handler], Awaitable[RespClient]]]:
    """A client of a socket that speaks as the handler says."""
    servers: list[asyncio.Server] = []
    clients: list[RespClient] = []

    async def serve(handler: Handler) -> RespClient:
        path = tmp_path / "scripted.sock"

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await handler(reader, writer)
            finally:
                writer.close()

        servers.append(await asyncio.start_unix_server(handle, path))
        clients.append(RespClient(f"unix://{path}", timeout_seconds=0.3))
        return clients[-1]

    yield serve
    for client in clients:
        await client.close()
    for server in servers:
        server.close()
        await server.wait_closed()


Serve = Callable[[Handler], Awaitable[RespClient]]


async def test_a_full_server_says_so_before_any_question(scripted: Serve) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"-ERR max number of clients reached\r\n")
        await writer.drain()

    client = await scripted(handler)
    with pytest.raises(StoreUnavailableError, match="max number of clients reached; raise the server's maxclients"):
        await client.execute("PING")


async def test_another_protocol_is_named(scripted: Serve) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()

    client = await scripted(handler)
    with pytest.raises(StoreUnavailableError, match="is this a Redis or Valkey server"):
        await client.execute("PING")


async def test_replies_cut_at_every_byte_are_put_together(scripted: Serve) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(b"+PONG\r\n")
        await reader.read(1000)
        for byte in b"*2\r\n$3\r\na\r\n\r\n:-7\r\n":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    client = await scripted(handler)
    assert await client.execute("ANY") == [b"a\r\n", -7]


async def test_one_late_reply_fails_its_call_only(scripted: Serve) -> None:
    late = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(b"+PONG\r\n")
        await reader.read(1000)
        # Part of the reply shows that the server lives, so the connection is kept.
        writer.write(b"$4\r\nfi")
        await late.wait()
        writer.write(b"rs\r\n+SECOND\r\n")
        await reader.read()

    client = await scripted(handler)
    with pytest.raises(StoreUnavailableError, match=r"did not answer within 0\.3 s"):
        await client.execute("FIRST")
    second = asyncio.create_task(client.execute("NEXT"))
    await asyncio.sleep(0)
    late.set()
    assert await second == b"SECOND"


async def eventually(call: Callable[[], Awaitable[object]]) -> object:
    """The call's result as soon as the store is available again."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await call()
            except StoreUnavailableError:
                await asyncio.sleep(0.02)
