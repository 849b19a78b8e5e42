"""A lean client of the Redis protocol (RESP2) that pipelines by itself: many callers, one connection, one write a turn.

Knows sockets, framing, deadlines and reconnection; knows no key of ours. `RedisStore` is its caller. It exists because
the general asyncio client costs about four times the CPU per call on the hot path, and ten times at concurrency 16.

Order: the server answers a connection's commands in order, so the n-th reply belongs to the n-th command. A dropped
connection fails every call in flight; whether the server carried them out is unknown, so what is sent here must be safe
to repeat. Connections are made on demand; while the server is away, calls fail at once until a back-off has passed.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from service.errors import ConfigurationError, StoreUnavailableError

Arg = bytes | str | int
"""One word of a command. Text is sent as UTF-8."""

Reply = Any
"""What the server answered: bytes, int, None, a list of these, or (in pipelines) a `hiredis.ReplyError`."""

BACKOFF_FIRST_SECONDS = 0.05
"""How long calls fail at once after the first failed connection attempt; doubles with each further one."""

BACKOFF_LAST_SECONDS = 2.0
"""Longest back-off: a store that came back is noticed within this time."""

_INCOMPLETE = object()

_log = logging.getLogger(__name__)

_UNAVAILABLE = {
    "LOADING": "the server is reading its data from disk; repeat the call in a moment",
    "READONLY": "this server is a replica; point the store's URL at the primary",
    "OOM": "raise the server's maxmemory, shorten the feedback window or trim the log",
    "MISCONF": "the server cannot write its data to disk; see its log and free disk space",
    "MASTERDOWN": "this replica has lost its primary; point the store's URL at the primary",
    "CLUSTERDOWN": "the cluster does not serve this slot; see CLUSTER INFO",
    "TRYAGAIN": "the slot is being moved; repeat the call in a moment",
    "MOVED": "the server is one node of a cluster; write the store's URL as redis+cluster://HOST:PORT",
    "ASK": "the slot is being moved; repeat the call in a moment",
    "BUSY": "a script has been running for long on the server; see SLOWLOG",
    "NOREPLICAS": "the server asks for replicas that it does not have; see min-replicas-to-write",
    "NOAUTH": "put the password into the store's URL: redis://:PASSWORD@host:port/0",
    "WRONGPASS": "correct user and password in the store's URL",
    "NOPERM": "allow the user the commands that docs/ lists for the store",
    "UNBLOCKED": "the server has changed its role or was told to; repeat the call",
}
"""First word of an error reply -> what helps. What is not here may heal by itself just as well: see `reply_error`."""

_NAMES_AN_ADDRESS = frozenset({"MOVED", "ASK"})
"""Replies that hold the address of a node; callers are shown the word alone."""

_REFUSED = frozenset({"ERR", "WRONGTYPE", "CROSSSLOT", "NOSCRIPT", "NOPROTO"})
"""First words of the replies to a command that the server will refuse again: a bug of ours, or a foreign key."""

_DROP_AFTER = frozenset({"READONLY", "MASTERDOWN", "UNBLOCKED"})
"""After a failover the name may lead to another server: connect afresh."""


class ReplyError(StoreUnavailableError):
    """The server refused a command for what it says or where it points (WRONGTYPE, ERR): a bug or a foreign key.

    Callers may repeat it like any call that the store did not serve: nothing was acknowledged, and an operator can
    mend the store.
    """


class NotReplicatedError(StoreUnavailableError):
    """The server has carried out the commands, and too few replicas said in time that they hold the outcome."""


def _pack(command: tuple[Arg, ...]) -> bytes:
    # The stub of hiredis 3 describes a tuple of exactly one word.
    return bytes(hiredis.pack_command(cast(Any, command)))


def reply_error(reply: hiredis.ReplyError, where: str) -> StoreUnavailableError:
    """Return the service's error for an error reply, with a remedy where one is known.

    Every reply means that the store has not served the call. A server, proxy or cluster may say words that nobody has
    listed, so only those of `_REFUSED` become a `ReplyError`.
    """
    sentence = str(reply)
    word = sentence.partition(" ")[0]
    remedy = _UNAVAILABLE.get(word)
    if remedy is None and "max number of clients" in sentence:
        remedy = "raise the server's maxclients or lower the number of gateways"
    if remedy is not None:
        shown = word if word in _NAMES_AN_ADDRESS else sentence
        return StoreUnavailableError(f"the store answered {shown}; {remedy}", where=f"{where}: {sentence}")
    error = ReplyError if word in _REFUSED else StoreUnavailableError
    _log.warning("store refused a command", extra={"fields": {"store": where, "error": sentence}})
    # Nobody knows what the rest of such a sentence tells about the network: it goes to the log only.
    return error(f"the store answered {word}: see the gateway's log for its sentence", where=f"{where}: {sentence}")


def wait_command(replicas: int, seconds: float) -> tuple[Arg, ...]:
    """Return the command that waits for replicas within a call of so many seconds."""
    # WAIT counts milliseconds; it must end before the call does, or the connection would look dead.
    return ("WAIT", replicas, max(1, int(seconds * 900)))


def check_replicated(replies: Sequence[Reply], confirmed: Reply, replicas: int, where: str) -> None:
    """Return if `confirmed`, the reply to WAIT after commands with these replies, is enough replicas.

    Raises:
        StoreUnavailableError: the server refused to wait. NotReplicatedError: too few replicas.
    """
    if isinstance(confirmed, hiredis.ReplyError):
        if not all(isinstance(reply, Exception) for reply in replies):
            raise StoreUnavailableError(f"the store answered {confirmed}; repeat the call", where=where)
        # A server that is a replica by now has refused the commands too: that is the reply that matters.
    elif confirmed < replicas:
        raise NotReplicatedError(
            f"the store: {confirmed} of {replicas} replicas confirmed; it may be stored all the same: "
            "repeat the call, and see INFO replication",
            where=where,
        )


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens and how to log in. `shown` never holds the password."""

    shown: str
    path: str | None
    host: str
    port: int
    username: str | None
    password: str | None
    db: int
    tls: ssl.SSLContext | None


def parse_endpoint(url: str) -> Endpoint:
    """Read `redis://`, `rediss://` or `unix://`, with user, password, database and the `ssl_*` words of redis-py.

    Raises:
        ConfigurationError: another scheme, a bad number, or a word in the query that is not understood.
    """
    try:
        parts: dict[str, Any] = dict(parse_url(url))
    except ValueError as error:
        # The sentence of the library quotes no part of the URL that could hold the password.
        raise ConfigurationError(f"the store's URL cannot be read: {error}") from error
    kind = parts.pop("connection_class", None)
    tls_words = {word: parts.pop(word) for word in list(parts) if word.startswith("ssl_")}
    path = parts.pop("path", None)
    username, password = parts.pop("username", None), parts.pop("password", None)
    host, port, db = parts.pop("host", "localhost"), parts.pop("port", 6379), parts.pop("db", 0)
    if parts:
        raise ConfigurationError(f"the store's URL has the unknown word {sorted(parts)[0]!r}; remove it")
    if url.startswith("unix:") and not path:
        raise ConfigurationError("the store's URL names no socket; write unix:///path/to/socket")
    tls = _tls_context(tls_words) if kind is SSLConnection else None
    shown = f"unix://{path}" if path else f"{'rediss' if tls else 'redis'}://{host}:{port}/{db}"
    return Endpoint(shown, path, host, port, username, password, db, tls)


def _tls_context(words: dict[str, Any]) -> ssl.SSLContext:
    """Certificates are verified unless the URL says `ssl_cert_reqs=none`."""
    verify = str(words.pop("ssl_cert_reqs", "required")).lower()
    check_hostname = str(words.pop("ssl_check_hostname", "true")).lower() in {"true", "1", "yes"}
    ca_file, ca_path = words.pop("ssl_ca_certs", None), words.pop("ssl_ca_path", None)
    cert_file, key_file = words.pop("ssl_certfile", None), words.pop("ssl_keyfile", None)
    key_password = words.pop("ssl_password", None)
    if words:
        raise ConfigurationError(f"the store's URL has the unknown word {sorted(words)[0]!r}; remove it")
    if verify not in {"required", "none"}:
        raise ConfigurationError(f"ssl_cert_reqs = {verify!r} in the store's URL; use 'required' or 'none'")
    try:
        context = ssl.create_default_context(cafile=ca_file, capath=ca_path)
        if cert_file is not None:
            context.load_cert_chain(cert_file, key_file, key_password)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"a certificate of the store's URL cannot be loaded: {error}") from error
    context.check_hostname = check_hostname and verify == "required"
    if verify == "none":
        context.verify_mode = ssl.CERT_NONE
    return context


class _Call:
    """One caller's commands: a future, how many replies it waits for, and those that came."""

    __slots__ = ("deadline", "future", "replies", "sent_at", "wanted")

    def __init__(self, future: asyncio.Future[list[Reply]], wanted: int, sent_at: float, deadline: float) -> None:
        self.future = future
        self.wanted = wanted
        self.sent_at = sent_at
        self.deadline = deadline
        self.replies: list[Reply] = []


class _Wire(asyncio.Protocol):
    """One live connection. It ends once, at the first drop, and is never used again.

    The greeting goes out as soon as the socket is open, so that whatever the server says first, be it a refusal, is the
    reply to it.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, shown: str, greeting: Sequence[tuple[Arg, ...]], timeout: float
    ) -> None:
        self._loop = loop
        self._greeting = greeting
        self._greeting_timeout = timeout
        self._shown = shown
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._transport: asyncio.Transport | None = None
        self._calls: deque[_Call] = deque()
        self._outgoing: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self._heard_at = 0.0
        self.open = False
        self.greeted: asyncio.Future[list[Reply]] = loop.create_future()
        self.lost = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.open = True
        packed = b"".join([_pack(command) for command in self._greeting])
        self.greeted = self.send(packed, len(self._greeting), self._greeting_timeout)

    def send(self, packed: bytes, wanted: int, timeout: float) -> asyncio.Future[list[Reply]]:
        """Queue packed commands; the future brings their `wanted` replies, or `StoreUnavailableError`."""
        loop = self._loop
        now = loop.time()
        call = _Call(loop.create_future(), wanted, now, now + timeout)
        self._calls.append(call)
        if not self._outgoing:
            # Every caller that is ready in this turn of the loop joins the same write.
            loop.call_soon(self._flush)
        self._outgoing.append(packed)
        if self._timer is None or call.deadline < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_at(call.deadline, self._check_deadlines)
        return call.future

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if self.open and self._transport is not None:
            self._transport.write(outgoing[0] if len(outgoing) == 1 else b"".join(outgoing))

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        reader, calls = self._reader, self._calls
        reader.feed(data)
        try:
            while calls:
                reply = reader.gets()
                if reply is _INCOMPLETE:
                    return
                call = calls[0]
                call.replies.append(reply)
                if len(call.replies) == call.wanted:
                    calls.popleft()
                    if not call.future.done():
                        call.future.set_result(call.replies)
        except hiredis.ProtocolError as error:
            self.drop(f"answered in another protocol ({error}); is this a Redis or Valkey server?")
            return
        if reader.has_data():
            self.drop("sent a reply that nobody asked for; the connection was closed")

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop("closed the connection")
        if not self.lost.done():
            self.lost.set_result(None)

    def drop(self, reason: str) -> None:
        """End the connection; every call in flight fails with the reason."""
        self.open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._calls:
            call = self._calls.popleft()
            if not call.future.done():
                call.future.set_exception(StoreUnavailableError(f"the store {reason}", where=self._shown))
        if self._transport is not None:
            self._transport.abort()

    def _check_deadlines(self) -> None:
        """One timer for all calls: a timer for each would cost more than the call."""
        self._timer = None
        now = self._loop.time()
        for call in self._calls:
            if call.deadline > now:
                continue
            waited = call.deadline - call.sent_at
            if self._heard_at <= call.sent_at:
                # Nothing at all came since: the peer may be gone without a word, and only a new connection can tell.
                self.drop(f"did not answer within {waited:.3g} s")
                return
            if not call.future.done():
                call.future.set_exception(
                    StoreUnavailableError(f"the store did not answer within {waited:.3g} s", where=self._shown)
                )
        # Done calls stay queued, since their replies are still to come; they need no further deadline.
        deadlines = [call.deadline for call in self._calls if not call.future.done()]
        if deadlines:
            self._timer = self._loop.call_at(min(deadlines), self._check_deadlines)


class _Slot:
    """One place of the pool: a wire while there is one, and when the next attempt may be made."""

    def __init__(self) -> None:
        self.wire: _Wire | None = None
        self.lock = asyncio.Lock()
        self.failures = 0
        self.retry_at = 0.0
        self.last_failure: StoreUnavailableError | None = None


class RespClient:
    """A fixed number of pipelined connections to one server. All calls of one client belong to one event loop.

    Args:
        url: see `parse_endpoint`; or what it returned.
        timeout_seconds: how long a call waits for its replies, and an attempt to connect for its end.
        connections: more than one lets small replies overtake large ones; calls take turns.
    """

    def __init__(self, url: str | Endpoint, *, timeout_seconds: float, connections: int = 1) -> None:
        if timeout_seconds <= 0:
            raise ConfigurationError(f"timeout_seconds = {timeout_seconds} of the store must be positive")
        if connections < 1:
            raise ConfigurationError(f"connections = {connections} of the store must be at least 1")
        self._endpoint = parse_endpoint(url) if isinstance(url, str) else url
        self._timeout = timeout_seconds
        self._slots = [_Slot() for _ in range(connections)]
        self._turn = 0
        self._closed = False

    @property
    def shown(self) -> str:
        """The server's address without secrets, for messages."""
        return self._endpoint.shown

    async def execute(self, *command: Arg, timeout_seconds: float | None = None) -> Reply:
        """Send one command and return its reply.

        Raises:
            StoreUnavailableError: not connected, dropped, too late, or the server says that it cannot serve now.
            ReplyError: the server refused the command.
        """
        replies = await self._send(_pack(command), 1, timeout_seconds or self._timeout)
        return self.checked(replies[0])

    async def pipeline(
        self, commands: Sequence[tuple[Arg, ...]], *, timeout_seconds: float | None = None, replicas: int = 0
    ) -> list[Reply]:
        """Send commands in one write and return their replies in order; error replies are returned, not raised.

        Args:
            commands: one after the other, on one connection.
            timeout_seconds: instead of the client's.
            replicas: so many replicas must hold what the server holds after the commands. Nothing else moves on the
                connection until they say so.

        Raises:
            StoreUnavailableError: not connected, dropped or too late, or too few replicas answered. Some commands may
                have been carried out.
        """
        if not commands:
            return []
        if replicas:
            return await self._replicated(commands, timeout_seconds or self._timeout, replicas)
        packed = b"".join([_pack(command) for command in commands])
        return await self._send(packed, len(commands), timeout_seconds or self._timeout)

    async def everywhere(self, commands: Sequence[tuple[Arg, ...]]) -> list[list[Reply]]:
        """Replies of every server to these commands, error replies included: here of one."""
        return [await self.pipeline(commands)]

    async def _replicated(self, commands: Sequence[tuple[Arg, ...]], seconds: float, replicas: int) -> list[Reply]:
        words = [*commands, wait_command(replicas, seconds)]
        replies = await self._send(b"".join([_pack(command) for command in words]), len(words), seconds)
        check_replicated(replies, replies.pop(), replicas, self.shown)
        return replies

    def checked(self, reply: Reply) -> Reply:
        """The reply, or the error that it is.

        Raises:
            StoreUnavailableError, ReplyError: see `reply_error`.
        """
        if isinstance(reply, hiredis.ReplyError):
            if str(reply).partition(" ")[0] in _DROP_AFTER:
                self.disconnect("is no longer the primary")
            raise reply_error(reply, self._endpoint.shown)
        return reply

    def disconnect(self, reason: str = "was disconnected by us") -> None:
        """Drop the live connections; the next call makes new ones."""
        for slot in self._slots:
            if slot.wire is not None:
                slot.wire.drop(reason)

    async def close(self) -> None:
        """Drop the connections and wait until the sockets are closed; later calls fail."""
        self._closed = True
        self.disconnect("was closed by us")
        wires = [slot.wire for slot in self._slots if slot.wire is not None]
        await asyncio.gather(*(wire.lost for wire in wires))

    async def _send(self, packed: bytes, wanted: int, seconds: float) -> list[Reply]:
        slots = self._slots
        slot = slots[0]
        if len(slots) > 1:
            self._turn = (self._turn + 1) % len(slots)
            slot = slots[self._turn]
        wire = slot.wire
        if wire is None or not wire.open:
            wire = await self._connect(slot)
        return await wire.send(packed, wanted, seconds)

    async def _connect(self, slot: _Slot) -> _Wire:
        """Connect once for all who wait; each waits no longer than one attempt."""
        loop = asyncio.get_running_loop()
        async with slot.lock:
            if self._closed:
                raise StoreUnavailableError("the store was closed by us", where=self.shown)
            if slot.wire is not None and slot.wire.open:
                return slot.wire
            if slot.last_failure is not None and loop.time() < slot.retry_at:
                raise StoreUnavailableError(slot.last_failure.message, where=slot.last_failure.where)
            try:
                wire = await self._attempt(loop)
            except StoreUnavailableError as error:
                backoff = min(BACKOFF_FIRST_SECONDS * 2**slot.failures, BACKOFF_LAST_SECONDS)
                slot.failures = min(slot.failures + 1, 30)
                slot.retry_at = loop.time() + backoff
                slot.last_failure = error
                raise
            if self._closed:
                wire.drop("was closed by us")
                await wire.lost
                raise StoreUnavailableError("the store was closed by us", where=self.shown)
            slot.failures = 0
            slot.wire = wire
            return wire

    async def _attempt(self, loop: asyncio.AbstractEventLoop) -> _Wire:
        """Open a socket and log in.

        Raises:
            StoreUnavailableError: the reason names the address and the remedy.
        """
        endpoint = self._endpoint
        wire = _Wire(loop, endpoint.shown, self._greeting(), self._timeout)
        try:
            async with asyncio.timeout(self._timeout):
                if endpoint.path is not None:
                    await loop.create_unix_connection(lambda: wire, endpoint.path)
                else:
                    await loop.create_connection(lambda: wire, endpoint.host, endpoint.port, ssl=endpoint.tls)
                replies = await wire.greeted
            for reply in replies:
                if isinstance(reply, hiredis.ReplyError):
                    error = reply_error(reply, endpoint.shown)
                    # Whatever is refused here (a wrong database number, say), the store cannot be used.
                    raise StoreUnavailableError(error.message, where=error.where)
        except (OSError, TimeoutError) as error:
            wire.greeted.cancel()
            wire.drop("could not be reached")
            sentence = str(error) or f"no answer within {self._timeout:.3g} s"
            raise StoreUnavailableError(
                "the store cannot be reached; start the server or correct the store's URL",
                where=f"{endpoint.shown}: {sentence}",
            ) from error
        except (asyncio.CancelledError, StoreUnavailableError):
            wire.greeted.cancel()
            wire.drop("was given up while logging in")
            raise
        return wire

    def _greeting(self) -> list[tuple[Arg, ...]]:
        endpoint = self._endpoint
        commands: list[tuple[Arg, ...]] = []
        if endpoint.password is not None:
            user = () if endpoint.username is None else (endpoint.username,)
            commands.append(("AUTH", *user, endpoint.password))
        if endpoint.db:
            commands.append(("SELECT", endpoint.db))
        # Always one question: a full server refuses in a reply, not in the handshake of the socket.
        commands.append(("PING",))
        return commands
