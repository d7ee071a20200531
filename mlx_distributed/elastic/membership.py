"""A worker's membership in a run: one stream to the coordinator, kept up by a thread of its own.

The thread that trains reads and changes the `View`; this one tells the coordinator of each change at once and says
where the worker stands twice a second, takes in its messages, and dials again whenever the stream has ended.

Not asyncio: the loops of a process share gRPC's poller, and each frame of a collective would wake this one too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import DecodeError

from mlx_distributed.comm._pb import membership_pb2 as pb
from mlx_distributed.comm.link_speed import UNKNOWN, LinkSpeed
from mlx_distributed.elastic.inquiry import (
    DESCRIBE,
    STATUS,
    Description,
    RunStatus,
    description_from_pb,
    status_from_pb,
)
from mlx_distributed.elastic.messages import (
    MAX_MESSAGE_BYTES,
    METHOD,
    SERVICE,
    TOKEN,
    arrival_to_pb,
    message_from_pb,
    standing_to_pb,
)
from mlx_distributed.elastic.protocol import Enter, Evicted, Facts, Fetch, Hello, Message, Refused
from mlx_distributed.elastic.state import HEARTBEAT_S
from mlx_distributed.elastic.worker import View
from mlx_distributed.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from mlx_distributed.comm.tls import Identity

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 0.8
"""Between two attempts to reach the coordinator."""
EVICTED_S = 0.25
"""A worker that was turned out says Hello again after this."""
ANSWER_S = 10.0
"""So long a coordinator may take to answer a question."""
MAX_ANSWER_BYTES = 4 << 20
LEAVE_S = 2.0
"""So long a worker that leaves tries to say so. A Mac that is about to sleep waits for 30 s."""

OPTIONS = [
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # A channel of its own for each attempt: the next one must not wait for the backoff of the one before.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # And so long an attempt to connect takes at most.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 500),
    # The stream of a Mac that fell asleep stays open for ever without.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
]

T = TypeVar("T")


class Membership:
    """Stays in touch with the coordinator until it is closed, or the run is over for this worker.

    Args:
        coordinator: its address.
        token: secret of the run.
        facts: of this worker's run.
        view: what the worker knows at first: who it is, and what state it has.
        address: where its collective and its state are served.
        identity: whose certificate the coordinator must show; None means that nothing is encrypted.
    """

    def __init__(
        self, coordinator: str, token: str, facts: Facts, view: View, address: str, identity: Identity | None = None
    ) -> None:
        self._coordinator, self._token, self._facts = coordinator, token, facts
        self._address, self._certificate = address, identity.certificate if identity else None
        self._changed = threading.Condition()
        # All below is read and written with the lock of `_changed`.
        self._view, self._speed, self._serial, self._told = view, 0.0, 0, False
        self._link = UNKNOWN
        self._leave: str | None = None
        """Why it is out of the run by its own wish; None where it takes part."""
        self._closed = False
        self._call: grpc.Call | None = None
        self._away_since_s: float | None = time.monotonic()
        self._thread = threading.Thread(target=self._stay, name="membership", daemon=True)
        self._thread.start()

    @property
    def view(self) -> View:
        """What is known now."""
        with self._changed:
            return self._view

    @property
    def away_s(self) -> float:
        """For how long there has been no coordinator."""
        with self._changed:
            return 0.0 if self._away_since_s is None else time.monotonic() - self._away_since_s

    def change(self, how: Callable[[View], View], speed: float | None = None, link: LinkSpeed | None = None) -> View:
        """Something has happened here: a reduction is done, state was fetched, a peer is silent. Told at once.

        Args:
            how: from the view before to the view after.
            speed: micro-batches per second, where it was measured anew; told with the next news.
            link: of this worker, likewise.
        """
        with self._changed:
            before, self._view = self._view, how(self._view)
            self._speed = self._speed if speed is None else speed
            self._link = self._link if link is None else link
            self._told = self._told and self._view == before
            self._changed.notify_all()
            return self._view

    def wait(self, condition: Callable[[View], T | None], timeout_s: float | None = None) -> T | None:
        """Block until the view gives something true, or the time is up (None)."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self._view), timeout_s) or None

    def leave(self, reason: str) -> None:
        """Leave the run until `come_back`: the others go on at once with what this worker was to do. What it has
        prepared counts if they have taken that step. Returns when the coordinator knows, or after `LEAVE_S`."""
        with self._changed:
            self._leave = reason
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._call is None, LEAVE_S) and self._call is not None:
                self._call.cancel()
            self._view = self._view.receive(self._view.term, Evicted(reason))
            self._changed.notify_all()

    def come_back(self) -> None:
        """Take part again, as after a connection that was lost."""
        with self._changed:
            self._leave = None
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """Leave the run in good order, for good."""
        with self._changed:
            self._closed = True
        self.leave(reason)
        self._thread.join()

    # Everything below runs in threads of its own: `_speak` in one of gRPC, the rest in ours.

    def _stay(self) -> None:
        """Dial until the run is over for this worker, or it has left."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            backoff_s = FIRST_BACKOFF_S if self._attend() else min(2 * backoff_s, LAST_BACKOFF_S)
            with self._changed:
                if self._away_since_s is None:
                    self._away_since_s = time.monotonic()
                pause_s = EVICTED_S if self._view.out else backoff_s
                if self._changed.wait_for(self._is_over, pause_s):
                    return
                self._changed.wait_for(lambda: self._is_over() or self._leave is None)
                if self._is_over():
                    return

    def _is_over(self) -> bool:
        return self._closed or self._view.ended is not None

    def _attend(self) -> bool:
        """One stream, to its end; whether there was one."""
        over = threading.Event()
        with open_channel(self._coordinator, self._certificate) as channel:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._speak(over), metadata=((TOKEN, self._token),))
            with self._changed:
                self._call = call
            call.initial_metadata()  # Blocks until the coordinator has taken the call, or there is none.
            connected = call.is_active()
            with self._changed:
                self._away_since_s = None if connected else self._away_since_s
            try:
                for data in call:
                    message = pb.FromCoordinator.FromString(data)
                    self._receive(message.term, message_from_pb(message))
            except (DecodeError, ValueError):
                connected = False  # Whoever that is: not again at once.
            except grpc.RpcError:
                if call.code() is grpc.StatusCode.UNAUTHENTICATED:
                    self._receive(self.view.term, Refused(f"{self._coordinator}: {call.details()}"))
            finally:
                call.cancel()
                with self._changed:
                    self._call = None
                    over.set()
                    self._changed.notify_all()
            return connected

    def _speak(self, over: threading.Event) -> Iterator[bytes]:
        """Who we are, then where we stand: at each change, and twice a second."""
        first = True
        while not over.is_set():
            with self._changed:
                leave = self._leave
                if first:
                    self._view = replace(self._view, out=None)
                self._serial += 1
                self._told = True
                standing = self._view.standing(self._serial, self._speed, self._link)
            if leave is not None:
                yield pb.FromWorker(leave=leave).SerializeToString()
                return
            hello = Hello(self._view.worker, self._address, self._facts, standing)
            yield (arrival_to_pb(hello) if first else standing_to_pb(standing)).SerializeToString()
            first = False
            with self._changed:
                news = lambda: not self._told or self._leave is not None or over.is_set()  # noqa: E731
                self._changed.wait_for(news, HEARTBEAT_S)

    def _receive(self, term: int, message: Message) -> None:
        with self._changed:
            # What was sent before the coordinator knew that this worker leaves would bring it back.
            if self._leave is None or not isinstance(message, Enter | Fetch):
                self.change(lambda view: view.receive(term, message))


@dataclass(frozen=True)
class Contact:
    """How a coordinator is asked something."""

    address: str
    token: str = field(repr=False)
    certificate: str | None
    """PEM, that it must show; None where nothing is encrypted."""

    def describe(self) -> Description:
        """What a new worker needs.

        Raises:
            ConfigError, TrainingError: as of `status`; or the run is over.
        """
        return description_from_pb(pb.Description.FromString(self._ask(DESCRIBE)))

    def status(self) -> RunStatus:
        """How the run stands.

        Raises:
            ConfigError: the token is not that of the run.
            TrainingError: there is no answer.
        """
        return status_from_pb(pb.RunStatus.FromString(self._ask(STATUS)))

    def _ask(self, method: str) -> bytes:
        with open_channel(self.address, self.certificate, MAX_ANSWER_BYTES) as channel:
            try:
                answer: bytes = channel.unary_unary(method)(b"", timeout=ANSWER_S, metadata=((TOKEN, self.token),))
                return answer
            except grpc.RpcError as error:
                raise _refusal(self.address, error.code(), error.details()) from None


def _refusal(address: str, code: grpc.StatusCode, details: str) -> ConfigError | TrainingError:
    """Why a coordinator has not answered, for people."""
    match code:
        case grpc.StatusCode.UNAUTHENTICATED:
            return ConfigError(
                f"the coordinator at {address} refuses the token: it serves another run now; use the join string that "
                "it has printed last"
            )
        case grpc.StatusCode.FAILED_PRECONDITION:
            return TrainingError(f"the coordinator at {address} lets nobody in any more: {details}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return ConfigError(
                f"what listens on {address} cannot be asked this: another program, or another version of this one; use "
                "the version that the run was started with"
            )
    return TrainingError(
        f"no coordinator answers at {address} ({details}); see whether the run is still on, and whether this machine "
        "reaches that one"
    )


def open_channel(address: str, certificate: str | None, max_bytes: int = MAX_MESSAGE_BYTES) -> grpc.Channel:
    """A channel to a coordinator.

    Args:
        address: of the coordinator.
        certificate: PEM, that it must show; None where nothing is encrypted.
        max_bytes: a larger message is refused before it is read.
    """
    options: list[tuple[str, int | str]] = [*OPTIONS, ("grpc.max_receive_message_length", max_bytes)]
    if certificate is None:
        return grpc.insecure_channel(address, options=options)
    from mlx_distributed.comm.tls import Identity  # imports a library that a run without TLS need not wait for

    options.append(("grpc.ssl_target_name_override", Identity.server_name))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(certificate.encode()), options=options)
