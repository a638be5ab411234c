"""Whole messages on a socket, and notes that take no lock."""

from __future__ import annotations

import select
import socket
import struct
import threading
import weakref
from contextlib import suppress
from functools import cache
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from mtpbatch.exceptions import NativeError
from mtpbatch.isolated.messages import Failure

# The app may have taken SIGPIPE back from Python; where there is no such flag it must not.
_QUIETLY: Final = getattr(socket, "MSG_NOSIGNAL", 0)
_HEADER: Final = struct.Struct("=?Q")  # whether it is a failure, and how many bytes follow
_MOST_BYTES: Final = 1 << 30  # an answer has a thousand times less
_NOTE: Final = struct.Struct("=q")

WAKE: Final = 0
"""The note that asks to end a wait; others are the tickets of requests to cancel."""

_Value = TypeVar("_Value")


class HangUp(Exception):
    """Whoever is at the other end has gone."""


def _value_of(value: Any) -> Any:
    """What msgspec asks about values of types that it does not know: exceptions, and grammars."""
    return Failure.of(value) if isinstance(value, BaseException) else value.number


def _from_value(kind: type, value: Any) -> Any:
    error = msgspec.convert(value, Failure).error
    if not (kind is NativeError and isinstance(error, NativeError)):
        raise ValueError(f"{error!r} is no {kind.__name__}")
    return error


@cache
def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Reads messages of that type, and refuses any other."""
    return msgspec.msgpack.Decoder(kind, dec_hook=_from_value)


class Channel:
    """One end of a socket on which whole messages go.

    Any number of threads may :meth:`ask`; they wait for each other. The other methods belong to one
    thread at each end, but :meth:`cut`, which any may call that knows it is not being closed.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_value_of)

    @property
    def busy(self) -> bool:
        """Whether somebody asks."""
        return self._lock.locked()

    def ask(self, request: Struct, kind: type[_Value]) -> _Value:
        """Send a request, and wait for the answer, which is of that type.

        Raises what answering it raised, or :class:`HangUp`.
        """
        with self._lock:
            self.send(request)
            return self.receive(kind)

    def send(self, message: object) -> None:
        """Send a message. Raises :class:`HangUp`."""
        data = self._encoder.encode(message)
        header = _HEADER.pack(isinstance(message, Failure), len(data))
        try:
            self._socket.sendall(header + data, _QUIETLY)
        except OSError:
            raise HangUp from None

    def receive(self, kind: type[_Value]) -> _Value:
        """Wait for a message of that type; raise what comes as a :class:`Failure` instead.

        Raises :class:`HangUp`, also for what is no such message.
        """
        failed, n_bytes = _HEADER.unpack(self._read(_HEADER.size))
        if n_bytes > _MOST_BYTES:
            raise HangUp
        data = self._read(n_bytes)
        expected: Any = Failure if failed else kind
        try:
            message: Any = decoder(expected).decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise HangUp from error
        if failed:
            raise message.error
        value: _Value = message
        return value

    def comes(self, seconds: float) -> bool:
        """Whether there is something to receive within that time, be it that nobody is there."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def hang_up(self) -> None:
        """Tell the other end that no more requests come."""
        with suppress(OSError):  # there may be no other end any more
            self._socket.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Have whoever waits for a message wait no longer."""
        with suppress(OSError):  # there may be no other end any more
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close this end, once nobody uses it."""
        with self._lock:
            self._socket.close()

    def _read(self, n_bytes: int) -> bytearray:
        data = bytearray(n_bytes)
        view = memoryview(data)
        while view:
            try:
                n_read = self._socket.recv_into(view)
            except OSError:
                n_read = 0
            if not n_read:
                raise HangUp
            view = view[n_read:]
        return data


class Notes:
    """The end of a socket that small notes are sent on, from any thread and at any time.

    It takes no lock, as a note may be sent where the garbage collector runs. So nobody can say when
    the socket may be closed, and its number taken by another one: that is when the last user lets
    go of this object.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setblocking(False)
        weakref.finalize(self, end.close)

    def send(self, note: int) -> None:
        """Send a note, unless there are thousands that nobody has read: these will do."""
        with suppress(OSError):
            self._socket.send(_NOTE.pack(note), _QUIETLY)

    def hang_up(self) -> None:
        """Tell the other end that no more notes come."""
        with suppress(OSError):  # there may be no other end any more
            self._socket.shutdown(socket.SHUT_WR)


def read_note(end: socket.socket) -> int | None:
    """Wait for a note; ``None``: no more come."""
    data = end.recv(_NOTE.size, socket.MSG_WAITALL)
    note: int | None = _NOTE.unpack(data)[0] if len(data) == _NOTE.size else None
    return note
