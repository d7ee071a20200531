"""The coordinator at work: gRPC streams and a journal around `transition`.

Everything runs in one asyncio loop, and an event is dealt with to its end before the next: a record is on disk before
what follows from it is told.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from mlx_distributed.comm._pb import membership_pb2 as pb
from mlx_distributed.elastic.inquiry import (
    DESCRIBE,
    STATUS,
    Description,
    description_to_pb,
    status_of,
    status_to_pb,
)
from mlx_distributed.elastic.journal import Journal
from mlx_distributed.elastic.messages import (
    MAX_MESSAGE_BYTES,
    METHOD,
    SERVICE,
    TOKEN,
    arrival_from_pb,
    message_to_pb,
    standing_from_pb,
)
from mlx_distributed.elastic.protocol import (
    Action,
    Append,
    Disconnected,
    End,
    Ended,
    Epoch,
    EpochRecord,
    Event,
    Evicted,
    Leave,
    Message,
    Probe,
    Probed,
    Refused,
    Report,
    Send,
    Tick,
    WaitFor,
    WorkerId,
)
from mlx_distributed.elastic.replay import started
from mlx_distributed.elastic.state import Rules, State, listed
from mlx_distributed.elastic.transition import transition
from mlx_distributed.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from mlx_distributed.comm.tls import Identity

TICK_S = 0.05
PROBE_S = 0.3
"""An address where nobody has refused a connection by then is taken as silent."""
HELLO_S = 10.0
"""A connection that has not said who it is by then is closed."""
MAX_WORKERS = 256
LAST_WORDS_S = 1.0
"""How long the coordinator stays after the end, so that workers hear of it."""

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # The stream of a Mac that fell asleep stays open for ever without.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.min_ping_interval_without_data_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),  # It seldom has something to say.
]


class Coordinator:
    """Serves one run, until it ends.

    Args:
        rules: of the run.
        journal: of the run, open.
        token: secret of the run; a call without it is not answered.
        tell: is given what people should know, a line at a time.
        identity: shown to all who connect; None means that nothing is encrypted. None need be shown: the token says who
            may speak.
        description: for workers that are to join; None where nobody may.
        clock: seconds that never go back.

    Raises:
        ConfigError: the journal is of another run, or damaged.
    """

    def __init__(
        self,
        rules: Rules,
        journal: Journal,
        token: str,
        tell: Callable[[str], None] = lambda _: None,
        identity: Identity | None = None,
        description: Description | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state: State
        self._clock = clock
        self.state, self._first = started(rules, journal.records, clock())
        self._journal, self._token, self._tell, self._identity = journal, token, tell, identity
        self._description = description
        self._members: list[str] = []
        """Of the last epoch."""
        self._streams: dict[WorkerId, asyncio.Queue[Message | None]] = {}
        """What is to be sent to each worker that is connected; None ends the stream."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving = False

    async def start(self, listen: str) -> str:
        """Take workers from now on; returns the address with its port.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self._end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=MAX_WORKERS)
        methods = {
            METHOD: grpc.stream_stream_rpc_method_handler(self._attend),
            DESCRIBE.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(self._describe),
            STATUS.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(self._status),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        try:
            if self._identity is None:
                port = self._server.add_insecure_port(listen)
            else:
                key, certificate = self._identity.key.encode(), self._identity.certificate.encode()
                credentials = grpc.ssl_server_credentials([(key, certificate)])
                port = self._server.add_secure_port(listen, credentials)
        except RuntimeError:
            raise ConfigError(
                f"the coordinator cannot listen on {listen}; is the port in use? Choose another, or 0 for a free one"
            ) from None
        self._serving = True
        self._do(self._first)  # The new term is on disk before the first worker comes.
        await self._server.start()
        self._spawn(self._tick())
        return f"{listen.rpartition(':')[0]}:{port}"

    async def end(self) -> End:
        """Serve until the run ends; why it did."""
        end = await asyncio.shield(self._end)
        deadline_s = time.monotonic() + LAST_WORDS_S
        while self._streams and time.monotonic() < deadline_s:
            await asyncio.sleep(TICK_S)
        return end

    async def stop(self) -> None:
        """Serve no more. Workers go on as far as they can, and wait for a coordinator with this journal."""
        self._serving = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop(grace=0)

    def _happen(self, event: Event) -> None:
        if self._serving:
            self.state, actions = transition(self.state, event, self._clock())
            self._do(actions)

    def _do(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case Append(record):
                    try:
                        self._journal.append(record)
                    except OSError as error:
                        # What is not written down must not be told: this coordinator can do nothing more.
                        self._serving = False
                        self._end.set_exception(
                            TrainingError(
                                f"the journal {self._journal.path} cannot be written ({error.strerror}); make room and "
                                "start the coordinator again, the workers wait for it"
                            )
                        )
                        return
                    if isinstance(record, EpochRecord):
                        self._tell_of(record.epoch)
                case Send(worker, message):
                    if queue := self._streams.get(worker):
                        queue.put_nowait(message)
                        if isinstance(message, Evicted | Refused | Ended):
                            queue.put_nowait(None)
                case Probe(worker, address):
                    self._spawn(self._probe(worker, address))
                case WaitFor(reason):
                    self._tell(reason or "training goes on")
                case End():
                    self._tell(action.reason)
                    self._end.set_result(action)

    def _tell_of(self, epoch: Epoch) -> None:
        """Say who has come, and who has gone."""
        members = [seat.worker.name for seat in epoch.seats]
        changes = (
            ("joined", [name for name in members if name not in self._members]),
            ("left out", [name for name in self._members if name not in members]),
        )
        if self._members:
            for what, changed in changes:
                if changed:
                    self._tell(f"{listed(changed)} {what}; {len(members)} workers train")
        self._members = members

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tick(self) -> None:
        while self._serving:
            await asyncio.sleep(TICK_S)
            self._happen(Tick())

    async def _probe(self, worker: WorkerId, address: str) -> None:
        host, _, port = address.rpartition(":")
        refused = False
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), PROBE_S)
            writer.close()
        except ConnectionRefusedError:
            refused = True
        except (OSError, TimeoutError, ValueError):
            pass  # Silence, or no way there: not for us to say that it is dead.
        self._happen(Probed(worker, refused))

    async def _admit(self, context: grpc.aio.ServicerContext) -> None:
        """End a call without the token of the run."""
        given = dict(context.invocation_metadata() or ()).get(TOKEN, "")
        if not hmac.compare_digest(str(given).encode(), self._token.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not that of this run")

    async def _describe(self, _: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await self._admit(context)
        refusal = "the run is for one machine" if self._description is None else ""
        if self.state.ended is not None or self.state.finished:
            refusal = f"the run is over: {self.state.ended or 'all steps are taken'}"
        if refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        assert self._description is not None
        return description_to_pb(self._description).SerializeToString()

    async def _status(self, _: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await self._admit(context)
        return status_to_pb(status_of(self.state, self._clock())).SerializeToString()

    async def _attend(self, _: object, context: grpc.aio.ServicerContext) -> None:
        """One stream of one worker."""
        await self._admit(context)
        await context.send_initial_metadata(())  # Nothing may be due to a worker; now it knows that we are here.
        try:
            first = pb.FromWorker.FromString(await asyncio.wait_for(context.read(), HELLO_S))
            hello = arrival_from_pb(first.arrival)
        except (DecodeError, TypeError, ValueError, TimeoutError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must say who calls")
        worker, queue = hello.worker, asyncio.Queue[Message | None]()
        if before := self._streams.get(worker):
            before.put_nowait(None)
        self._streams[worker] = queue
        reader = asyncio.create_task(self._read(worker, queue, context))
        writer = asyncio.create_task(self._write(queue, context))
        try:
            self._happen(hello)
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            # At once: gRPC may cancel this call while it waits for its tasks.
            if self._streams.get(worker) is queue:
                del self._streams[worker]
                self._happen(Disconnected(worker))
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(
        self, worker: WorkerId, queue: asyncio.Queue[Message | None], context: grpc.aio.ServicerContext
    ) -> None:
        while (data := await context.read()) is not grpc.aio.EOF:
            try:
                message = pb.FromWorker.FromString(data)
                left = message.WhichOneof("body") == "leave"
                event = Leave(worker, message.leave) if left else Report(worker, standing_from_pb(message.standing))
            except (DecodeError, ValueError):
                return
            if self._streams.get(worker) is queue:
                self._happen(event)

    async def _write(self, queue: asyncio.Queue[Message | None], context: grpc.aio.ServicerContext) -> None:
        while (message := await queue.get()) is not None:
            await context.write(message_to_pb(self.state.term, message).SerializeToString())
